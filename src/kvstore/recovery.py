"""The index built anew from the records, which are the only truth.

Runs when a file is opened that was not closed, or whose directory, extent map or allocator fail
their checksum; also makes the index of a new file, which is that of no records.

1. Scan every extent for records: aligned magic, sane sizes, inside its extent, at a multiple of its
   class's block size, checksum right, not expired. Where records of two classes are in one extent,
   those of the newest record's class win; only operations never flushed can have led to that.
2. Clear the magic of everything that lost, and write extent map, free lists and an empty table with
   a segment for every run of hashes, made to measure from a count of the hashes met.
3. Scan the winners again and insert their slots. Of two records of one key the newer wins.
4. Flush.

Records are not moved and the file stays marked "not clean" until it is closed, so a crash in here
does no harm: it starts again. The memory it takes does not depend on the number of records.
"""

import logging
from array import array
from heapq import heapify, heappop, heappush
from itertools import accumulate
from time import monotonic
from typing import Final

from xxhash import xxh3_64_intdigest

from .datafile import DataFile, Undo
from .errors import StoreFullError
from .extents import Extents
from .layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    CLASS_HEADS_OFFSET,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    ENTRY_FRESH_SHIFT,
    ENTRY_KIND_MASK,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FIXED_EXTENTS,
    FREE_BLOCK,
    FREE_MAGIC,
    KIND_FIXED,
    KIND_FREE,
    KIND_SEGMENT,
    KIND_SLAB,
    MAX_DEPTH,
    MAX_KEY_CHARACTERS,
    MAX_KEY_SIZE,
    MAX_VALUE_SIZE,
    MIN_DEPTH,
    MIN_VALUE_SIZE,
    NO_BLOCK,
    NO_EXPIRY,
    NO_EXTENT,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    RECORD_MAGIC_BYTES,
    RECORD_WORDS,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_VALUE_SIZE_SHIFT,
    SPLIT_AT,
    U16,
    map_entry_offset,
    segment_run,
)
from .segment import build
from .slab import Slab
from .table import Table

logger = logging.getLogger("kvstore")

_PROGRESS_SECONDS: Final = 1.0
_NO_MAGIC: Final = bytes(8)


def rebuild(file: DataFile, extents: Extents, slab: Slab, table: Table, now_ms: int) -> None:
    """Build the index of `file` from its records, which must be nobody else's to touch meanwhile.

    Raises:
        StoreFullError: the disk or the file has no room for the table.
        OSError: the operating system refused a write or the flush.
    """
    file.begin_changes()
    started = monotonic()
    rebuilding = _Rebuild(file, extents, slab, table, now_ms)
    rebuilding.scan()
    rebuilding.lay_out_table()
    rebuilding.fill_table()
    file.flush()
    file.accept_rebuilt_index()
    rebuilding.report(monotonic() - started)


class _Rebuild:
    """The steps of `rebuild`, and what they count."""

    def __init__(
        self, file: DataFile, extents: Extents, slab: Slab, table: Table, now_ms: int
    ) -> None:
        self._file = file
        self._extents = extents
        self._slab = slab
        self._table = table
        self._now_ms = now_ms
        self._last_extent = file.extent_count
        self._progress_due = monotonic() + _PROGRESS_SECONDS
        # How many records' hashes lead to each entry of the directory.
        self._hashes = array("I", bytes(4 * DIRECTORY_ENTRIES))
        self.records = 0
        self.expired = 0
        self.damaged = 0
        self.outdated = 0

    # --- step 1 and 2 --------------------------------------------------------------------------

    def scan(self) -> None:
        """Judge every record; write the extent map, the allocator and the free lists."""
        file = self._file
        entries = bytearray()
        heads = [NO_EXTENT] * len(BLOCK_SIZES)
        free = NO_EXTENT
        for extent in range(FIXED_EXTENTS):
            entries += SLAB_ENTRY.pack(KIND_FIXED, 0, 0, 0, 0, NO_EXTENT, NO_EXTENT, 0)
        for extent in range(FIXED_EXTENTS, self._last_extent):
            self._show_progress("scanned", extent)
            entry = self._scan_extent(extent)
            if entry is None:
                entries += SLAB_ENTRY.pack(KIND_FREE, 0, 0, 0, 0, NO_EXTENT, free, 0)
                free = extent
                continue
            size_class, live, first_free, fresh = entry
            next_extent = NO_EXTENT
            if first_free != NO_BLOCK or fresh < BLOCKS_PER_EXTENT[size_class]:
                next_extent, heads[size_class] = heads[size_class], extent
                if next_extent != NO_EXTENT:
                    _set_previous(entries, next_extent, extent)
            entries += SLAB_ENTRY.pack(
                KIND_SLAB, size_class, live, first_free, fresh, NO_EXTENT, next_extent, 0
            )
        allocator = bytearray(ALLOCATOR_SIZE)
        U16.pack_into(allocator, 0, free)
        U16.pack_into(allocator, 2, self._last_extent)
        for size_class, head in enumerate(heads):
            U16.pack_into(allocator, CLASS_HEADS_OFFSET - ALLOCATOR_OFFSET + 2 * size_class, head)
        file.write(EXTENT_MAP_OFFSET, bytes(entries))
        file.write(ALLOCATOR_OFFSET, bytes(allocator))

    def _scan_extent(self, extent: int) -> tuple[int, int, int, int] | None:
        """Find an extent's records and leave only those whole, live and of one class.

        Returns:
            Size class, live blocks, first free block and fresh block; None where nothing lives.
        """
        base = extent << EXTENT_SHIFT
        contents = self._file.map[base : base + EXTENT_SIZE]
        position = contents.find(RECORD_MAGIC_BYTES)
        if position < 0:
            return None
        seed = self._file.hash_seed
        hashes = self._hashes
        now_ms = self._now_ms
        find, unpack = contents.find, RECORD_WORDS.unpack_from
        found: list[tuple[int, int, int, int]] = []  # size class, position, hash, created_at
        lost: list[int] = []
        while position >= 0:
            if not position & BLOCK_ALIGNMENT - 1:
                head, created_at, expires_at, checksum = unpack(contents, position)
                key_start = position + RECORD_HEADER_SIZE
                value_start = key_start + (head >> SLOT_KEY_SIZE_SHIFT)
                end = value_start + (head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF)
                key = contents[key_start:value_start]
                key_hash = xxh3_64_intdigest(key, seed)
                if (
                    end <= EXTENT_SIZE
                    and checksum
                    == xxh3_64_intdigest(
                        contents[value_start:end], key_hash ^ created_at ^ expires_at << 16
                    )
                    and _is_sane(key, end - value_start)
                ):
                    size_class = SIZE_CLASSES[end - position + BLOCK_ALIGNMENT - 1 >> 5]
                    if position % BLOCK_SIZES[size_class]:
                        self.damaged += 1
                        lost.append(position)
                    elif expires_at and expires_at <= now_ms:
                        self.expired += 1
                        lost.append(position)
                    else:
                        found.append((size_class, position, key_hash, created_at))
                        hashes[key_hash >> DIRECTORY_SHIFT] += 1
                        position = end - 1  # nothing inside a record can look like one
                else:
                    self.damaged += 1
                    lost.append(position)
            position = find(RECORD_MAGIC_BYTES, position + 1)
        return self._settle_extent(base, found, lost)

    def _settle_extent(
        self, base: int, found: list[tuple[int, int, int, int]], lost: list[int]
    ) -> tuple[int, int, int, int] | None:
        """Keep one class's records of those found, clear what lost, and chain the free blocks."""
        write = self._file.write
        size_class = NO_BLOCK
        if found:
            size_class = found[0][0]
            if any(record[0] != size_class for record in found):
                size_class = max(found, key=lambda record: record[3])[0]
                for other_class, position, key_hash, _ in found:
                    if other_class != size_class:
                        self.outdated += 1
                        self._hashes[key_hash >> DIRECTORY_SHIFT] -= 1
                        lost.append(position)
                found = [record for record in found if record[0] == size_class]
        for position in lost:
            write(base + position, _NO_MAGIC)
        if not found:
            return None
        self.records += len(found)
        block_size = BLOCK_SIZES[size_class]
        live = {position // block_size for _, position, _, _ in found}
        fresh = max(live) + 1
        first_free = NO_BLOCK
        if len(live) < fresh:
            for block in range(fresh - 1, -1, -1):
                if block not in live:
                    write(base + block * block_size, FREE_BLOCK.pack(FREE_MAGIC, first_free, 0))
                    first_free = block
        return size_class, len(live), first_free, fresh

    def lay_out_table(self) -> None:
        """Write an empty table in free extents, with room for the hashes that were counted.

        Segments that could not hold their records come first; where extents run out, others are
        filled beyond 7/8.
        """
        below = [0, *accumulate(self._hashes)]
        waiting = [
            (below[prefix] - below[prefix + segment_run(MIN_DEPTH)], MIN_DEPTH, prefix)
            for prefix in range(0, DIRECTORY_ENTRIES, segment_run(MIN_DEPTH))
        ]
        segments: list[tuple[int, int]] = []
        reserve = [self._take_extent() for _ in waiting]
        heapify(waiting)
        while waiting:
            negative_count, depth, prefix = heappop(waiting)
            count = -negative_count
            if count > SPLIT_AT and depth < MAX_DEPTH:
                try:
                    reserve.append(self._take_extent())
                except StoreFullError:
                    if count > SEGMENT_SLOTS:
                        raise
                else:
                    half = segment_run(depth + 1)
                    middle = below[prefix + half]
                    heappush(waiting, (below[prefix] - middle, depth + 1, prefix))
                    heappush(
                        waiting, (middle - below[prefix + 2 * half], depth + 1, prefix + half)
                    )
                    continue
            segments.append((depth, prefix))
        directory = array("H", bytes(2 * DIRECTORY_ENTRIES))
        for extent, (depth, prefix) in zip(sorted(reserve), sorted(segments), strict=True):
            image, _ = build(extent, depth, prefix, [])
            self._file.write(extent << EXTENT_SHIFT, image)
            run = segment_run(depth)
            directory[prefix : prefix + run] = array("H", [extent]) * run
        self._file.write(DIRECTORY_OFFSET, directory.tobytes())

    def _take_extent(self) -> int:
        with self._extents.lock, Undo(self._file) as undo:
            extent = self._extents.take(undo)
            undo.write(
                map_entry_offset(extent), SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 0, 0, 0, NO_EXPIRY)
            )
        return extent

    # --- step 3 --------------------------------------------------------------------------------

    def fill_table(self) -> None:
        """Insert a slot for every record, and free the older of two records of one key."""
        words = self._file.words
        for extent in range(FIXED_EXTENTS, self._last_extent):
            entry = words[map_entry_offset(extent) >> 3]
            if entry & ENTRY_KIND_MASK == KIND_SLAB:
                self._show_progress("indexed", extent)
                fresh = entry >> ENTRY_FRESH_SHIFT
                self._insert_extent(extent, BLOCK_SIZES[entry >> 8 & 0xFF], fresh)

    def _insert_extent(self, extent: int, block_size: int, fresh: int) -> None:
        seed, mapped = self._file.hash_seed, self._file.map
        find, insert, unpack = self._table.find, self._table.insert, RECORD_WORDS.unpack_from
        base = extent << EXTENT_SHIFT
        for offset in range(base, base + fresh * block_size, block_size):
            head, created_at, expires_at, _ = unpack(mapped, offset)
            if head & 0xFFFF_FFFF != RECORD_MAGIC:
                continue
            key_start = offset + RECORD_HEADER_SIZE
            key = mapped[key_start : key_start + (head >> SLOT_KEY_SIZE_SHIFT)]
            key_hash = xxh3_64_intdigest(key, seed)
            slot = find(key_hash, key)
            if slot > 0:
                slot = self._settle_key(slot, key_hash, key, created_at)
            if slot < 0:
                value_size = head >> SLOT_VALUE_SIZE_SHIFT & 0xFFFF
                insert(-slot, key_hash, key, offset, value_size, expires_at)
            else:
                self.records -= 1
                self.outdated += 1
                self._slab.give(offset)

    def _settle_key(self, slot: int, key_hash: int, key: bytes, created_at: int) -> int:
        """Of two records of one key let the newer have the slot; return as `find` does.

        Only operations that were never flushed can have left both.
        """
        record = self._file.words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK
        _, other_created_at, _, _ = RECORD_WORDS.unpack_from(self._file.map, record)
        if created_at <= other_created_at:
            return slot
        self.records -= 1
        self.outdated += 1
        self._table.delete(slot, key)
        return self._table.find(key_hash, key)

    # --- what it says --------------------------------------------------------------------------

    def _show_progress(self, what: str, extent: int) -> None:
        if monotonic() >= self._progress_due:
            self._progress_due = monotonic() + _PROGRESS_SECONDS
            logger.info(
                "%s: recovery has %s %d of %d extents, %d records",
                self._file.path,
                what,
                extent,
                self._last_extent,
                self.records,
            )

    def report(self, seconds: float) -> None:
        """Log what was found; nothing for a new file."""
        if not (self.records or self.expired or self.damaged or self.outdated):
            return
        logger.warning(
            "%s: was not closed; rebuilt the index of %d records in %.2f s; "
            "dropped %d expired, %d outdated and %d damaged ones",
            self._file.path,
            self.records,
            seconds,
            self.expired,
            self.outdated,
            self.damaged,
        )


def _is_sane(key: bytes, value_size: int) -> bool:
    """Tell whether key and value are such as the store takes."""
    if not 0 < len(key) <= MAX_KEY_SIZE or not MIN_VALUE_SIZE <= value_size <= MAX_VALUE_SIZE:
        return False
    if len(key) <= MAX_KEY_CHARACTERS and key.isascii():
        return True
    try:
        return len(key.decode()) <= MAX_KEY_CHARACTERS
    except UnicodeDecodeError:
        return False


def _set_previous(entries: bytearray, extent: int, previous: int) -> None:
    U16.pack_into(entries, 16 * extent + 8, previous)
