"""All records of one extent, without any index: see `records` for what is one.

Where whole records of two classes are in one extent, the class with the most bytes wins, and either
may. For an extent changes its class only when all its blocks were cleared, and retired and marked
ones are cleared only when nothing older can come back. So only clearings, and later records, that
were never flushed can have led to that. That the disk took all of the former, or nothing of the
latter, could have been as well; so no record that loses is one that a key was promised to have.
"""

from array import array
from struct import Struct
from typing import Final, NamedTuple

from xxhash import xxh3_64_intdigest

from .layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    FOUND_HASH_MASK,
    FOUND_OFFSET_SHIFT,
    FREE_MAGIC,
    FREE_NEXT_SHIFT,
    GENERATION_SHIFT,
    MARKED_MAGIC,
    MARKED_MAGIC_BYTES,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    NO_BLOCK,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_SIZE,
    SLOT_VALUE_SIZE_SHIFT,
    STAMP_LIMIT,
    TIME_LIMIT,
    U64,
    bucket_marker,
)
from .records import is_valid_record, magics, size_class_at

_TIME_AND_TAIL: Final = Struct("<QQ")  # of a slot
_MAGICS: Final = (RECORD_MAGIC_BYTES, MARKED_MAGIC_BYTES)


class ExtentScan(NamedTuple):
    """What the aligned magics of an extent are of, by their positions in it, ascending."""

    winner: int
    """The size class that the extent is to have; -1 where no whole record is in it."""
    whole: list[int]
    """Whole records of that class."""
    outdated: list[int]
    """Likewise, but of another class."""
    damaged: list[int]
    """No whole records."""
    astray: list[int]
    """No records at all: bytes of a page of the table that look like a magic."""


def classify(contents: bytes, base: int, hash_seed: int) -> ExtentScan:
    """Tell what each aligned magic of the extent at file offset `base` is of."""
    classes: dict[int, int] = {}
    damaged: list[int] = []
    astray: list[int] = []
    sizes: dict[int, int] = {}
    for position in magics(contents):
        size_class = size_class_at(contents, position)
        if size_class < 0 or not is_valid_record(contents, position, base, hash_seed):
            (astray if is_of_table(contents, position, base) else damaged).append(position)
            continue
        classes[position] = size_class
        sizes[size_class] = sizes.get(size_class, 0) + BLOCK_SIZES[size_class]
    winner = max(sizes, key=lambda size_class: sizes[size_class], default=-1)
    whole = [position for position, size_class in classes.items() if size_class == winner]
    outdated = [position for position, size_class in classes.items() if size_class != winner]
    return ExtentScan(winner, whole, outdated, damaged, astray)


def is_of_table(contents: bytes, position: int, base: int) -> bool:
    """Return whether an aligned magic of no whole record is of a page of the table, or of a former.

    It may be the lower half of a time in a slot: two milliseconds in 49.7 days look so. A time is
    below the limit, and the slot's sizes follow in the next word; in a record the sizes are in the
    word of the magic, which thus is no time. Or it may be four control bytes.
    """
    in_page = position & BUCKET_SIZE - 1
    page = position - in_page
    if in_page < BUCKET_HEADER_SIZE:
        (marker,) = U64.unpack_from(contents, page)
        in_controls = CONTROL_OFFSET <= in_page < CONTROL_OFFSET + SLOT_COUNT
        return in_controls and bool(marker == bucket_marker(base + page))
    time, tail = _TIME_AND_TAIL.unpack_from(contents, position)
    return (
        (in_page - BUCKET_HEADER_SIZE) % SLOT_SIZE == SLOT_EXPIRES_OFFSET
        and time < TIME_LIMIT
        and 0 < tail >> SLOT_KEY_SIZE_SHIFT <= MAX_KEY_SIZE
    )


# --- an extent whose magics are all of one class, as a rule ---------------------------------------


def find_magics(contents: bytes) -> tuple[int, int, int]:
    """Look for the magics of records in an extent, marked ones too.

    Returns:
        How many there are, how many of them are aligned as a block is, and where the first of these
        is; -1 where there is none.
    """
    count = sum(map(contents.count, _MAGICS))
    if not count:
        return 0, 0, -1
    heads = memoryview(contents).cast("I")[:: BLOCK_ALIGNMENT >> 2].tolist()
    numbers = [heads.count(magic) for magic in (RECORD_MAGIC, MARKED_MAGIC)]
    firsts = [
        heads.index(magic)
        for magic, number in zip((RECORD_MAGIC, MARKED_MAGIC), numbers, strict=True)
        if number
    ]
    return count, sum(numbers), min(firsts) * BLOCK_ALIGNMENT if firsts else -1


class FoundBlocks(NamedTuple):
    """The whole records in the blocks of one class of an extent."""

    positions: "array[int]"
    """Where they are in the extent, ascending."""
    words: "array[int]"
    """For each its word: see `found_words`."""
    doubtful: "array[int]"
    """The words of those that may have to be cleared or mended, even without another of their key.

    They are marked, void, or expired, or have a generation.
    """
    latest_stamp: int
    """Of all of them; 0 where there is none."""


def scan_blocks(
    contents: bytes, base: int, size_class: int, hash_seed: int, now_ms: int, void_stamp: int
) -> FoundBlocks:
    """Find the whole records in the blocks of one class of the extent at file offset `base`.

    Those with stamps up to `void_stamp` are void.
    """
    block_size = BLOCK_SIZES[size_class]
    # With no more bytes than this it is of another class.
    least = BLOCK_SIZES[size_class - 1] if size_class else RECORD_HEADER_SIZE
    end_of_blocks = BLOCKS_PER_EXTENT[size_class] * block_size
    header = memoryview(contents)[:end_of_blocks].cast("Q")
    step = block_size >> 3
    # Local names, here and in `members_of_words`: these two loops are all that recovery costs.
    digest, header_size = xxh3_64_intdigest, RECORD_HEADER_SIZE
    hash_mask, offset_shift = FOUND_HASH_MASK, FOUND_OFFSET_SHIFT
    heads, stamps = header[0::step].tolist(), header[1::step].tolist()
    expiries = header[2::step].tolist()
    if max(stamps) >= STAMP_LIMIT:
        heads = [
            head if stamp < STAMP_LIMIT else 0 for head, stamp in zip(heads, stamps, strict=True)
        ]
    # Few different pairs of sizes occur: what follows from a header's first word is kept.
    spans = {head: _value_span(head, least, block_size) for head in set(heads)}
    positions, words = array("H"), array("Q")
    for position, offset, head, stamp, expires_at, checksum in zip(
        range(0, end_of_blocks, block_size),
        range(base, base + end_of_blocks, block_size),
        heads,
        stamps,
        expiries,
        header[3::step].tolist(),
        strict=True,
    ):
        value_start, end = spans[head]
        if end:
            value_start += position
            key_hash = digest(contents[position + header_size : value_start], hash_seed)
            checksum_seed = key_hash ^ stamp ^ offset
            if expires_at:
                if expires_at >= TIME_LIMIT:
                    continue
                checksum_seed ^= expires_at << 16
            if checksum == digest(contents[value_start : position + end], checksum_seed):
                positions.append(position)
                words.append(key_hash & hash_mask | offset << offset_shift)
    found = [position // block_size for position in positions]
    doubtful = array("Q")
    # As a rule, nothing in an extent gives reason to look at each record again.
    if (
        any(map(_is_retired, spans))
        or min(stamps) <= void_stamp
        or any(0 < expires_at <= now_ms for expires_at in set(expiries))
    ):
        for block, word in zip(found, words, strict=True):
            if (
                _is_retired(heads[block])
                or stamps[block] <= void_stamp
                or 0 < expiries[block] <= now_ms
            ):
                doubtful.append(word)
    latest = max(map(stamps.__getitem__, found), default=0)
    return FoundBlocks(positions, words, doubtful, latest)


def _is_retired(head: int) -> bool:
    """Return whether a record with this first word is marked or has a generation."""
    return head & 0xFFFF_FFFF == MARKED_MAGIC or head >> GENERATION_SHIFT != 0


def _value_span(head: int, least: int, most: int) -> tuple[int, int]:
    """Return where the value of a record with this first word begins and ends; (0, 0) if none.

    A record of its class takes more than `least` bytes and `most` at the most.
    """
    magic = head & 0xFFFF_FFFF
    key_size = head >> SLOT_KEY_SIZE_SHIFT & 0xFF
    value_size = head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
    value_start = RECORD_HEADER_SIZE + key_size
    if (
        magic in (RECORD_MAGIC, MARKED_MAGIC)
        and 0 < key_size <= MAX_KEY_SIZE
        and MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
        and least < value_start + value_size <= most
    ):
        return value_start, value_start + value_size
    return 0, 0


def link_free_blocks(positions: "array[int]", block_size: int) -> tuple[int, list[tuple[int, int]]]:
    """Link the blocks before and between the live ones at these positions to a free list.

    Returns:
        The first of them, `NO_BLOCK` where there is none, and the positions and words to write.
    """
    first_free, links = NO_BLOCK, []
    live = set(positions)
    for block in range(positions[-1] // block_size, -1, -1):
        position = block * block_size
        if position not in live:
            links.append((position, FREE_MAGIC | first_free << FREE_NEXT_SHIFT))
            first_free = block
    return first_free, links
