"""Records told from garbage in the bytes of one extent, without any index.

An aligned magic, sane sizes, a block of its class inside the extent, and the right checksum make a
record. (A right checksum vouches for key and place.) Where whole records of two classes are in one
extent, the class with the most bytes wins. Only operations that were never flushed can have led to
that, and then either class may win: an extent changes its class only when all its records were
deleted.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from .layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    EXTENT_SIZE,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC_BYTES,
    SIZE_CLASSES,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_SIZE,
    TIME_LIMIT,
    U64,
    bucket_marker,
    key_hash,
    record_checksum,
)

_TIME_AND_TAIL: Final = Struct("<QQ")  # of a slot


class ExtentScan(NamedTuple):
    """What the aligned magics of an extent are of, by their positions in it, ascending."""

    winner: int
    """The size class that the extent is to have; -1 where nothing live is in it."""
    live: list[int]
    """Whole records of that class which have not expired."""
    outdated: list[int]
    """Likewise, but of another class."""
    expired: list[int]
    """Whole records past their expiry."""
    damaged: list[int]
    """No whole records."""
    astray: list[int]
    """No records at all: bytes of a page of the table that look like a magic."""


def classify(contents: bytes, base: int, hash_seed: int, now_ms: int) -> ExtentScan:
    """Tell what each aligned magic of the extent at file offset `base` is of."""
    whole: dict[int, int] = {}
    expired = []
    damaged: list[int] = []
    astray: list[int] = []
    sizes: dict[int, int] = {}
    for position in magics(contents):
        size_class = size_class_at(contents, position)
        if size_class < 0 or not is_valid_record(contents, position, base, hash_seed):
            (astray if is_of_table(contents, position, base) else damaged).append(position)
            continue
        expires_at = RECORD.unpack_from(contents, position)[5]
        if expires_at and expires_at <= now_ms:
            expired.append(position)
            continue
        whole[position] = size_class
        sizes[size_class] = sizes.get(size_class, 0) + BLOCK_SIZES[size_class]
    winner = max(sizes, key=lambda size_class: sizes[size_class], default=-1)
    live = [position for position, size_class in whole.items() if size_class == winner]
    outdated = [position for position, size_class in whole.items() if size_class != winner]
    return ExtentScan(winner, live, outdated, expired, damaged, astray)


def magics(contents: bytes) -> Iterator[int]:
    """Yield where a record's magic is in an extent, aligned as a block is."""
    position = contents.find(RECORD_MAGIC_BYTES)
    while position >= 0:
        if position % BLOCK_ALIGNMENT == 0:
            yield position
        position = contents.find(RECORD_MAGIC_BYTES, position + 1)


def is_of_table(contents: bytes, position: int, base: int) -> bool:
    """Return whether an aligned magic of no whole record is of a page of the table, or of a former.

    It may be the lower half of a time in a slot: one millisecond in 49.7 days looks so. There the
    sizes follow at once, and the uppermost bytes of a record's time of creation are zero. Or it may
    be four control bytes.
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


def size_class_at(contents: bytes, position: int) -> int:
    """Return the size class that a magic in an extent goes with; -1 where it can be no record's."""
    if position % BLOCK_ALIGNMENT or position + RECORD_HEADER_SIZE > EXTENT_SIZE:
        return -1
    header: tuple[int, ...] = RECORD.unpack_from(contents, position)
    _, value_size, key_size, flags, *_ = header
    if (
        flags
        or not 0 < key_size <= MAX_KEY_SIZE
        or not MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
    ):
        return -1
    size = RECORD_HEADER_SIZE + key_size + value_size
    size_class = SIZE_CLASSES[size + BLOCK_ALIGNMENT - 1 >> 5]
    if position % BLOCK_SIZES[size_class] or position + BLOCK_SIZES[size_class] > EXTENT_SIZE:
        return -1
    return size_class


def is_valid_record(contents: bytes, position: int, base: int, hash_seed: int) -> bool:
    """Return whether the record of sane sizes at `position` has the right checksum.

    `contents` are those of the extent at file offset `base`.
    """
    header: tuple[int, ...] = RECORD.unpack_from(contents, position)
    _, value_size, key_size, _, created_at, expires_at, checksum = header
    value_start = position + RECORD_HEADER_SIZE + key_size
    key = contents[position + RECORD_HEADER_SIZE : value_start]
    value = contents[value_start : value_start + value_size]
    # The checksum leaves out what it cannot be: the upper bits of an expiry past the limit.
    return expires_at < TIME_LIMIT and checksum == record_checksum(
        value, key_hash(key, hash_seed), created_at, expires_at, base + position
    )
