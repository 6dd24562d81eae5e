"""What recovery notes of each record that it finds: a word that sorts by hash and has its place.

It is the hash of the record's key with the record's place, which is its offset in steps of 32, in
the middle. What is left of the hash is all that a segment asks of it: the lowest 12 bits are home
bucket and fingerprint, and by the uppermost 27 two records of one key are found close together.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from kvstore.compiled import compiled_rebuild
from kvstore.format.layout import (
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    DIRECTORY_ENTRIES,
    DIRECTORY_SHIFT,
    FINGERPRINT_SHIFT,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_VALUE_SIZE,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_VALUE_SIZE_SHIFT,
    TIME_LIMIT,
)

_HOME_BITS: Final = FINGERPRINT_SHIFT + 8
_PLACE_BITS: Final = 25
UPPER_SHIFT: Final = _HOME_BITS + _PLACE_BITS
# An offset is shifted to its place, and what is no part of it masked: 1 << 25 steps are 1 GiB.
OFFSET_SHIFT: Final = _HOME_BITS - (BLOCK_ALIGNMENT.bit_length() - 1)
OFFSET_MASK: Final = (1 << _PLACE_BITS) * BLOCK_ALIGNMENT - BLOCK_ALIGNMENT
HASH_MASK: Final = ~(OFFSET_MASK << OFFSET_SHIFT)
_PART_SHIFT: Final = 56


class FoundRecords:
    """Finds records in the extents of a file of this hash seed, and notes them.

    Attributes:
        any_expires: whether one of them may have an expiry.
    """

    # Words are parted by their uppermost bits, so that not all of them are ever sorted at a time:
    # sorting takes five times the memory that they do.
    _part_count = 1 << 64 - _PART_SHIFT

    def __init__(self, hash_seed: int, now_ms: int) -> None:
        self._hash_seed = hash_seed
        self._now_ms = now_ms
        self._parts = [array("Q") for _ in range(self._part_count)]
        self.any_expires = False

    # --- taking them ---------------------------------------------------------------------------

    def find_magics(self, contents: bytes) -> tuple[int, int]:
        """Return how many magics there are in an extent, and where the first one is."""
        return contents.count(RECORD_MAGIC_BYTES), contents.find(RECORD_MAGIC_BYTES)

    def count_magics(self, contents: bytes) -> tuple[int, int]:
        """Return how many magics there are in an extent, and how many aligned as a block is."""
        count = contents.count(RECORD_MAGIC_BYTES)
        if not count:
            return 0, 0
        heads = memoryview(contents).cast("I")[:: BLOCK_ALIGNMENT >> 2].tolist()
        return count, heads.count(RECORD_MAGIC)

    def scan_blocks(self, contents: bytes, base: int, size_class: int) -> "array[int]":
        """Note the whole, live records in an extent's blocks of one class; return where they are.

        Extents are scanned in the order of their offsets `base`.
        """
        block_size = BLOCK_SIZES[size_class]
        least = least_size(size_class)
        end_of_blocks = BLOCKS_PER_EXTENT[size_class] * block_size
        words = memoryview(contents)[:end_of_blocks].cast("Q")
        step = block_size >> 3
        # Local names, here and in recovery's `_members`: these two loops are all that it costs.
        seed, now_ms, digest = self._hash_seed, self._now_ms, xxh3_64_intdigest
        header_size, part_shift = RECORD_HEADER_SIZE, _PART_SHIFT
        hash_mask, offset_shift = HASH_MASK, OFFSET_SHIFT
        notes = [part.append for part in self._parts]
        heads = words[0::step].tolist()
        expiries = words[2::step].tolist()
        self.any_expires = self.any_expires or any(expiries)
        # Few different pairs of sizes occur: what follows from a header's first word is kept.
        shapes = {head: _shape(head, least, block_size) for head in set(heads)}
        positions = array("H")
        for position, offset, head, created_at, expires_at, checksum in zip(
            range(0, end_of_blocks, block_size),
            range(base, base + end_of_blocks, block_size),
            heads,
            words[1::step].tolist(),
            expiries,
            words[3::step].tolist(),
            strict=True,
        ):
            value_start, end = shapes[head]
            if end:
                value_start += position
                key_hash = digest(contents[position + header_size : value_start], seed)
                checksum_seed = key_hash ^ created_at ^ offset
                if expires_at:
                    if not now_ms < expires_at < TIME_LIMIT:
                        continue
                    checksum_seed ^= expires_at << 16
                if checksum == digest(contents[value_start : position + end], checksum_seed):
                    positions.append(position)
                    notes[key_hash >> part_shift](key_hash & hash_mask | offset << offset_shift)
        return positions

    def forget_from(self, base: int) -> None:
        """Forget the records of the extent at offset `base`, which was scanned last."""
        for part in self._parts:
            while part and part[-1] >> OFFSET_SHIFT & OFFSET_MASK >= base:
                part.pop()

    def forget(self, words: "set[int]") -> None:
        """Forget these."""
        for part in self._parts:
            part[:] = array("Q", (word for word in part if word not in words))

    # --- going through them --------------------------------------------------------------------

    def sort(self) -> None:
        """Put them in order, which all that follows needs."""
        for part in self._parts:
            part[:] = array("Q", sorted(part))

    def words(self) -> Iterator[int]:
        """Yield all of them."""
        return chain.from_iterable(self._parts)

    def slices(self, prefix: int, run: int) -> "Iterator[tuple[array[int], int, int]]":
        """Yield parts, with start and end, of the words that lead to `run` directory entries."""
        run_of_part = DIRECTORY_ENTRIES // self._part_count
        for number in range(prefix // run_of_part, (prefix + run - 1) // run_of_part + 1):
            part = self._parts[number]
            start, end = 0, len(part)
            if run < run_of_part:
                start = bisect_left(part, prefix << DIRECTORY_SHIFT)
                end = bisect_left(part, prefix + run << DIRECTORY_SHIFT)
            yield part, start, end

    def count(self, prefix: int, run: int) -> int:
        """Return how many lead to `run` directory entries from `prefix` on."""
        return sum(end - start for _, start, end in self.slices(prefix, run))


class CompiledFoundRecords(FoundRecords):
    """Likewise, with what is done for each record compiled."""

    _twin: Any = compiled_rebuild
    _part_count = 1  # they are sorted in place

    def __init__(self, hash_seed: int, now_ms: int) -> None:
        super().__init__(hash_seed, now_ms)
        self.any_expires = True  # for all that is known: it costs nothing to look

    def find_magics(self, contents: bytes) -> tuple[int, int]:
        """As `FoundRecords`, but of magics that are aligned as blocks are: no others count."""
        found: tuple[int, int] = self._twin.find_magics(contents)
        return found

    def count_magics(self, contents: bytes) -> tuple[int, int]:
        """As `FoundRecords`."""
        counts: tuple[int, int] = self._twin.count_magics(contents)
        return counts

    def scan_blocks(self, contents: bytes, base: int, size_class: int) -> "array[int]":
        """As `FoundRecords`."""
        (words,) = self._parts
        block_size, least = BLOCK_SIZES[size_class], least_size(size_class)
        positions: array[int] = self._twin.scan_blocks(
            contents, base, block_size, least, self._hash_seed, self._now_ms, words
        )
        return positions

    def sort(self) -> None:
        """As `FoundRecords`."""
        (words,) = self._parts
        self._twin.sort_words(words)


def least_size(size_class: int) -> int:
    """Return what a record of this class takes more bytes than: with no more it is of another."""
    return BLOCK_SIZES[size_class - 1] if size_class else RECORD_HEADER_SIZE


def _shape(head: int, least: int, most: int) -> tuple[int, int]:
    """Return where value and record end begin, in a record with this first word; (0, 0) if none.

    A record of its class takes more than `least` bytes and `most` at the most.
    """
    key_size = head >> SLOT_KEY_SIZE_SHIFT  # and above it the flags, which are 0
    value_size = head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
    value_start = RECORD_HEADER_SIZE + key_size
    if (
        head & 0xFFFF_FFFF == RECORD_MAGIC
        and 0 < key_size <= MAX_KEY_SIZE
        and MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE
        and least < value_start + value_size <= most
    ):
        return value_start, value_start + value_size
    return 0, 0
