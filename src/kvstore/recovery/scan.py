"""The first half of a rebuild: find the records, and make extent map, allocator and free lists."""

from array import array
from struct import Struct
from typing import Final

from kvstore.compiled import Implementation
from kvstore.file.datafile import DataFile
from kvstore.format.extent_records import FoundBlocks, classify
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
    RECORD_MAGIC,
    RECORD_STAMP_OFFSET,
    SHAPE_OFFSET,
    SHAPE_REBUILDS_SHIFT,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLAB_PREVIOUS_OFFSET,
    U16,
    U64,
    bucket_marker,
)
from kvstore.format.records import size_class_at

from .found_records import FoundRecords
from .report import Report

_NO_MAGIC: Final = bytes(8)
_COUNT_MASK: Final = 0xFFFF


class Scan:
    """Goes through the extents of `file` and adds the whole records to `found`.

    Attributes:
        slabs: by the extents that have records, ascending, the beginnings of their entries: size
            class, live blocks, first free block, fresh block.
        latest_stamp: of all records, whatever became of them.
    """

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
        self.slabs: dict[int, tuple[int, int, int, int]] = {}
        self.latest_stamp = 0

    def run(self) -> None:
        """Find every record. Clear what is none, and what is not of the class of its extent."""
        count = self._file.extent_count
        for extent in range(FIXED_EXTENTS, count):
            self._report.show_progress("scanned", extent, count, "extents")
            base = extent << EXTENT_SHIFT
            contents = self._file.map[base : base + EXTENT_SIZE]
            self._note_rebuilds(contents, base)
            self._scan_extent(contents, base)

    def _scan_extent(self, contents: bytes, base: int) -> None:
        """Leave in the extent at offset `base` only whole records of one class, and add them."""
        _, magics, first = self._implementation.find_magics(contents)
        if not magics:
            return
        # As a rule all magics are those of whole records of one class. Whatever is not shows in
        # their number, and is looked at one by one.
        size_class = size_class_at(contents, first)
        blocks = self._scan_blocks(contents, base, size_class)
        if blocks is None or len(blocks.positions) != magics:
            size_class = self._clear_losers(contents, base)
            contents = self._file.map[base : base + EXTENT_SIZE]
            blocks = self._scan_blocks(contents, base, size_class)
        if blocks is not None and blocks.positions:
            self._found.add(blocks)
            self._report.records += len(blocks.positions)
            self.latest_stamp = max(self.latest_stamp, blocks.latest_stamp)
            self._note_slab(base >> EXTENT_SHIFT, size_class, blocks.positions)

    def look_again(self, extent: int) -> None:
        """Find out what is left in an extent in which records were cleared."""
        size_class, *_ = self.slabs[extent]
        size = BLOCK_SIZES[size_class]
        start = extent << EXTENT_SHIFT
        end = start + BLOCKS_PER_EXTENT[size_class] * size
        heads = self._file.words[start >> 3 : end >> 3 : size >> 3].tolist()
        positions = array(
            "H",
            (
                block * size
                for block, head in enumerate(heads)
                if head & 0xFFFF_FFFF == RECORD_MAGIC
            ),
        )
        if positions:
            self._note_slab(extent, size_class, positions)
        else:
            del self.slabs[extent]

    def _note_slab(self, extent: int, size_class: int, positions: "array[int]") -> None:
        """Note the entry of an extent that has records there, and link its free blocks."""
        first_free, fresh = self._chain_free_blocks(
            extent << EXTENT_SHIFT, BLOCK_SIZES[size_class], positions
        )
        self.slabs[extent] = (size_class, len(positions), first_free, fresh)

    def write_map(self) -> None:
        """Write the extent map and the allocator: all but the slabs is free."""
        count = self._file.extent_count
        entries = bytearray(EXTENT_MAP_SIZE)
        heads = [NO_EXTENT] * len(BLOCK_SIZES)
        for extent in range(FIXED_EXTENTS):
            _set_entry(entries, extent, KIND_FIXED)
        for extent, state in self.slabs.items():
            size_class, _, first_free, fresh = state
            next_extent = NO_EXTENT
            if first_free != NO_BLOCK or fresh < BLOCKS_PER_EXTENT[size_class]:
                next_extent, heads[size_class] = heads[size_class], extent
                if next_extent != NO_EXTENT:
                    U16.pack_into(entries, 16 * next_extent + SLAB_PREVIOUS_OFFSET, extent)
            _set_entry(entries, extent, KIND_SLAB, state, next_extent)
        free_extents = [
            extent for extent in range(FIXED_EXTENTS, count) if extent not in self.slabs
        ]
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

    def _scan_blocks(self, contents: bytes, base: int, size_class: int) -> FoundBlocks | None:
        if size_class < 0:
            return None
        file = self._file
        return self._implementation.scan_blocks(
            contents, base, size_class, file.hash_seed, self._now_ms, file.void_stamp
        )

    def _clear_losers(self, contents: bytes, base: int) -> int:
        """Clear every magic of an extent that is not of a whole record of the winning class.

        Returns:
            That class, which has the most bytes of blocks; -1 where there is none.
        """
        scan = classify(contents, base, self._file.hash_seed)
        for position in scan.outdated:
            (stamp,) = U64.unpack_from(contents, position + RECORD_STAMP_OFFSET)
            self.latest_stamp = max(self.latest_stamp, stamp)
        for position in (*scan.outdated, *scan.damaged, *scan.astray):
            self._file.write(base + position, _NO_MAGIC)
        self._report.outdated += len(scan.outdated)
        if scan.damaged and not self._report.damaged:
            self._report.first_damaged = base + scan.damaged[0]
        self._report.damaged += len(scan.damaged)
        return scan.winner

    def _chain_free_blocks(
        self, base: int, block_size: int, positions: "array[int]"
    ) -> tuple[int, int]:
        """Link the blocks between those to a list; return its first and the fresh block."""
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
