"""The first half of a rebuild: find the records, and make extent map, allocator and free lists."""

from array import array
from struct import Struct
from typing import Final

from kvstore.compiled import Implementation
from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_SIZE,
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    KIND_FIXED,
    KIND_FREE,
    KIND_SLAB,
    NO_BLOCK,
    NO_EXTENT,
    REBUILDS_OFFSET,
    SHAPE_OFFSET,
    SHAPE_REBUILDS_SHIFT,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLAB_PREVIOUS_OFFSET,
    U16,
    bucket_marker,
)
from kvstore.format.records import classify, size_class_at

from .found_records import FoundRecords
from .report import Report

_NO_MAGIC: Final = bytes(8)
_COUNT_MASK: Final = 0xFFFF


class Scan:
    """Goes through the extents of `file` and adds the records that are kept to `found`."""

    def __init__(
        self,
        file: DataFile,
        found: FoundRecords,
        report: Report,
        now_ms: int,
        implementation: Implementation,
    ) -> None:
        self._file = file
        self._found = found
        self._report = report
        self._now_ms = now_ms
        self._implementation = implementation
        self._rebuilds_seen: set[int] = set()

    def run(self) -> None:
        """Judge every record; write the extent map, the allocator and the free lists."""
        count = self._file.extent_count
        entries = bytearray(EXTENT_MAP_SIZE)
        heads = [NO_EXTENT] * len(BLOCK_SIZES)
        free_extents = []
        for extent in range(count):
            if extent < FIXED_EXTENTS:
                _set_entry(entries, extent, KIND_FIXED)
                continue
            self._report.show_progress("scanned", extent, count, "extents")
            base = extent << EXTENT_SHIFT
            size_class, positions = self._scan_extent(base)
            if not positions:
                free_extents.append(extent)
                continue
            first_free, fresh = self._chain_free_blocks(base, BLOCK_SIZES[size_class], positions)
            next_extent = NO_EXTENT
            if first_free != NO_BLOCK or fresh < BLOCKS_PER_EXTENT[size_class]:
                next_extent, heads[size_class] = heads[size_class], extent
                if next_extent != NO_EXTENT:
                    U16.pack_into(entries, 16 * next_extent + SLAB_PREVIOUS_OFFSET, extent)
            state = (size_class, len(positions), first_free, fresh)
            _set_entry(entries, extent, KIND_SLAB, state, next_extent)
        fresh_extent = count
        while free_extents and free_extents[-1] == fresh_extent - 1:
            fresh_extent = free_extents.pop()
        first = NO_EXTENT
        for extent in reversed(free_extents):
            _set_entry(entries, extent, KIND_FREE, next_extent=first)
            first = extent
        rebuilds = self._next_rebuilds()
        allocator = Struct(f"<HHHH{len(heads)}H").pack(first, fresh_extent, rebuilds, 0, *heads)
        # To the end of the map: growth that power loss took back may have left entries behind.
        self._file.write(EXTENT_MAP_OFFSET, bytes(entries))
        self._file.write(ALLOCATOR_OFFSET, allocator.ljust(ALLOCATOR_SIZE, b"\0"))

    def _scan_extent(self, base: int) -> "tuple[int, array[int]]":
        """Leave in the extent at offset `base` only records whole, live and of one class.

        Returns:
            Their size class and their positions in the extent, ascending.
        """
        contents = self._file.map[base : base + EXTENT_SIZE]
        self._note_rebuilds(contents, base)
        _, magics, first = self._implementation.find_magics(contents)
        if not magics:
            return 0, array("H")
        # As a rule all magics are those of live records of one class. Whatever is not shows in
        # their number, and is looked at one by one.
        size_class = size_class_at(contents, first)
        positions, words = self._scan_blocks(contents, base, size_class)
        if len(positions) != magics:
            size_class = self._clear_losers(contents, base)
            contents = self._file.map[base : base + EXTENT_SIZE]
            positions, words = self._scan_blocks(contents, base, size_class)
        self._found.add(words)
        self._report.records += len(positions)
        return size_class, positions

    def _note_rebuilds(self, contents: bytes, base: int) -> None:
        """Note what the pages that are buckets, or were, say of how often the index was rebuilt."""
        words = memoryview(contents).cast("Q")
        step, shape = BUCKET_SIZE >> 3, SHAPE_OFFSET >> 3
        for page, marker in enumerate(words[::step].tolist()):
            if marker == bucket_marker(base + page * BUCKET_SIZE):
                rebuilds = words[page * step + shape] >> SHAPE_REBUILDS_SHIFT & _COUNT_MASK
                self._rebuilds_seen.add(rebuilds)

    def _next_rebuilds(self) -> int:
        """Return the next number of rebuilds that is on no page; any, if all of them are."""
        before = self._file.shorts[REBUILDS_OFFSET >> 1]
        numbers = (before + step & _COUNT_MASK for step in range(1, _COUNT_MASK))
        return next((number for number in numbers if number not in self._rebuilds_seen), 0)

    def _scan_blocks(
        self, contents: bytes, base: int, size_class: int
    ) -> "tuple[array[int], array[int]]":
        if size_class < 0:
            return array("H"), array("Q")
        return self._implementation.scan_blocks(
            contents, base, size_class, self._file.hash_seed, self._now_ms
        )

    def _clear_losers(self, contents: bytes, base: int) -> int:
        """Clear every magic of an extent that is not of a whole, live record of the winning class.

        Returns:
            That class, which has the most bytes of blocks; -1 where there is none.
        """
        scan = classify(contents, base, self._file.hash_seed, self._now_ms)
        for position in (*scan.outdated, *scan.expired, *scan.damaged, *scan.astray):
            self._file.write(base + position, _NO_MAGIC)
        self._report.outdated += len(scan.outdated)
        self._report.expired += len(scan.expired)
        if scan.damaged and not self._report.damaged:
            self._report.first_damaged = base + scan.damaged[0]
        self._report.damaged += len(scan.damaged)
        return scan.winner

    def _chain_free_blocks(
        self, base: int, block_size: int, positions: "array[int]"
    ) -> tuple[int, int]:
        """Link the blocks between live ones to a list; return its first and the fresh block."""
        if self._file.in_memory:  # where nothing will be created, spare the memory
            return NO_BLOCK, BLOCKS_PER_EXTENT[SIZE_CLASSES[block_size // BLOCK_ALIGNMENT]]
        fresh = positions[-1] // block_size + 1
        if len(positions) == fresh:
            return NO_BLOCK, fresh
        first_free, links = self._implementation.link_free_blocks(positions, block_size)
        for position, link in links:
            self._file.write_word(base + position >> 3, link)
        return first_free, fresh


def _set_entry(
    entries: bytearray,
    extent: int,
    kind: int,
    blocks: tuple[int, int, int, int] = (0, 0, 0, 0),
    next_extent: int = NO_EXTENT,
) -> None:
    SLAB_ENTRY.pack_into(entries, 16 * extent, kind, *blocks, NO_EXTENT, next_extent, 0, 0)
