"""The index built anew from the records, which are the only truth.

Runs when a file is opened that was not closed, or whose directory, extent map or allocator fail
their checksum, once `evidence` has nothing against it; also makes the index of a new file, which is
that of no records.

1. Scan every extent for whole, live records of one class: see `scan`. Find out which numbers of
   rebuilds the buckets in the file have, for this one to get another: see `layout`, "Segment".
2. Clear the magic of everything that lost; write extent map, allocator and free lists.
3. Write each segment of a fresh table whole, in free extents, then the directory. Of two records of
   one key the newer gets the slot, and the older is freed: likewise. Flush.

Every file gets its table, whatever power loss has left. Say that everything was last flushed at a
time F, with a table of T extents that held a slot for each record there was then. What the disk may
hold are those records, promised or deleted since, and newer ones, which are promised to nobody;
those that are durable were flushed with a table of their own, whose extents count like the T. No
record is in any extent of that table, for a segment stays one. So the T are left, and enough for
the records of F. Only all records together may need more, in a file at its limit: as where old ones
were deleted and new ones created in other blocks, and the disk took the latter but not the former.
Then the newest are given up, as few as that takes: no record of F is among them, unless the clock
was set back since. A process that died has left one state, for which its table was enough.

Records are not moved and the file stays marked "not clean" until it is closed, so a crash in here
does no harm: it starts again. It takes 8 bytes of memory a record for as long as it runs.
"""

import logging
from array import array
from bisect import bisect_left
from heapq import heapify, heappop, heappush
from itertools import accumulate, chain
from struct import Struct
from time import monotonic
from typing import Any, Final

from kvstore.compiled import compiled_rebuild
from kvstore.errors import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    ALLOCATOR_OFFSET,
    ALLOCATOR_SIZE,
    BLOCK_ALIGNMENT,
    BLOCK_SIZES,
    BLOCKS_PER_EXTENT,
    BUCKET_SIZE,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    EXTENT_MAP_OFFSET,
    EXTENT_MAP_SIZE,
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
    MIN_DEPTH,
    NEVER,
    NO_BLOCK,
    NO_EXPIRY,
    NO_EXTENT,
    REBUILDS_OFFSET,
    RECORD,
    RECORD_CREATED_OFFSET,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SHAPE_OFFSET,
    SHAPE_REBUILDS_SHIFT,
    SIZE_CLASSES,
    SLAB_ENTRY,
    SLAB_PREVIOUS_OFFSET,
    SLOT,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_WORDS,
    SPLIT_AT,
    U16,
    bucket_marker,
    bucket_shape,
    map_entry_offset,
    segment_run,
)
from kvstore.format.records import classify, size_class_at
from kvstore.format.segment import Member, build
from kvstore.index.extents import Extents
from kvstore.index.slab import Slab

from .found_records import (
    HASH_MASK,
    OFFSET_MASK,
    OFFSET_SHIFT,
    UPPER_SHIFT,
    CompiledFoundRecords,
    FoundRecords,
)

logger = logging.getLogger("kvstore")

_PROGRESS_SECONDS: Final = 1.0
_NO_MAGIC: Final = bytes(8)
_COUNT_MASK: Final = 0xFFFF


def rebuild(file: DataFile, extents: Extents, slab: Slab, now_ms: int) -> None:
    """Build the index of `file` from its records, which must be nobody else's to touch meanwhile.

    A file whose blocks are shared takes room to be changed. Where a full disk has none, the index
    is built in memory, if `file` can do that, and serves readers in this opening.

    Raises:
        StoreFullError: the disk or the file has no room for the table.
        OSError: the operating system refused a write or the flush.
    """
    try:
        _rebuild(file, extents, slab, now_ms)
    except StoreFullError as error:
        if not file.private:
            raise
        file.use_private_map()
        _rebuild(file, extents, slab, now_ms)
        file.make_read_only(error)


def _rebuild(file: DataFile, extents: Extents, slab: Slab, now_ms: int) -> None:
    started = monotonic()
    file.mark_dirty()
    kind = _Rebuild if compiled_rebuild is None else _CompiledRebuild
    rebuilding = kind(file, extents, slab, now_ms)
    file.read_ahead(True)
    rebuilding.scan()
    file.read_ahead(False)
    rebuilding.write_table()
    slab.free_spare()
    if not file.in_memory:
        file.flush()
    file.accept_rebuilt_index()
    rebuilding.report(monotonic() - started)


class _Rebuild:
    """The steps of `rebuild`, and what they count."""

    _kind_of_notes: type[FoundRecords] = FoundRecords

    def __init__(self, file: DataFile, extents: Extents, slab: Slab, now_ms: int) -> None:
        self._file = file
        self._extents = extents
        self._slab = slab
        self._now_ms = now_ms
        self._progress_due = monotonic() + _PROGRESS_SECONDS
        self._notes = self._kind_of_notes(file.hash_seed, now_ms)
        self._records = 0
        self._expired = 0
        self._damaged = 0
        self._first_damaged = 0
        self._outdated = 0
        self._unplaced = 0
        self._given_up = 0
        self._rebuilds_seen: set[int] = set()
        self._rebuilds = 0

    # --- records, extent by extent -------------------------------------------------------------

    def scan(self) -> None:
        """Judge every record; write the extent map, the allocator and the free lists."""
        count = self._file.extent_count
        entries = bytearray(EXTENT_MAP_SIZE)
        heads = [NO_EXTENT] * len(BLOCK_SIZES)
        free_extents = []
        for extent in range(count):
            if extent < FIXED_EXTENTS:
                _set_entry(entries, extent, KIND_FIXED)
                continue
            self._show_progress("scanned", extent, count, "extents")
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
        self._rebuilds = self._next_rebuilds()
        allocator = Struct(f"<HHHH{len(heads)}H").pack(
            first, fresh_extent, self._rebuilds, 0, *heads
        )
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
        magics, first = self._notes.find_magics(contents)
        if not magics:
            return 0, array("H")
        # As a rule all magics are those of live records of one class. Whatever is not shows in
        # their number, and is looked at one by one.
        size_class = size_class_at(contents, first)
        positions = self._scan_blocks(contents, base, size_class)
        if len(positions) != magics:
            self._notes.forget_from(base)
            size_class = self._clear_losers(contents, base)
            contents = self._file.map[base : base + EXTENT_SIZE]
            positions = self._scan_blocks(contents, base, size_class)
        self._records += len(positions)
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

    def _scan_blocks(self, contents: bytes, base: int, size_class: int) -> "array[int]":
        if size_class < 0:
            return array("H")
        return self._notes.scan_blocks(contents, base, size_class)

    def _clear_losers(self, contents: bytes, base: int) -> int:
        """Clear every magic of an extent that is not of a whole, live record of the winning class.

        Returns:
            That class, which has the most bytes of blocks; -1 where there is none.
        """
        verdict = classify(contents, base, self._file.hash_seed, self._now_ms)
        for position in (*verdict.outdated, *verdict.expired, *verdict.damaged, *verdict.astray):
            self._file.write(base + position, _NO_MAGIC)
        self._outdated += len(verdict.outdated)
        self._expired += len(verdict.expired)
        if verdict.damaged and not self._damaged:
            self._first_damaged = base + verdict.damaged[0]
        self._damaged += len(verdict.damaged)
        return verdict.winner

    def _chain_free_blocks(
        self, base: int, block_size: int, positions: "array[int]"
    ) -> tuple[int, int]:
        """Link the blocks between live ones to a list; return its first and the fresh block."""
        if self._file.in_memory:  # where nothing will be created, spare the memory
            return NO_BLOCK, BLOCKS_PER_EXTENT[SIZE_CLASSES[block_size // BLOCK_ALIGNMENT]]
        fresh = positions[-1] // block_size + 1
        if len(positions) == fresh:
            return NO_BLOCK, fresh
        return self._link_free_blocks(base, block_size, positions), fresh

    def _link_free_blocks(self, base: int, block_size: int, positions: "array[int]") -> int:
        """Link the blocks before and between live ones, from the last; return the first."""
        first_free = NO_BLOCK
        live = set(positions)
        for block in range(positions[-1] // block_size, -1, -1):
            if block * block_size not in live:
                self._file.write(
                    base + block * block_size, FREE_BLOCK.pack(FREE_MAGIC, first_free, 0)
                )
                first_free = block
        return first_free

    # --- the table, segment by segment ---------------------------------------------------------

    def write_table(self) -> None:
        """Write a fresh table for the records that were noted."""
        self._notes.sort()
        directory = array("H", bytes(2 * DIRECTORY_ENTRIES))
        layout = self._find_room()
        for number, (extent, depth, prefix) in enumerate(layout):
            self._show_progress("written", number, len(layout), "segments")
            run = segment_run(depth)
            image, earliest, live = self._build_segment(extent, depth, prefix)
            self._file.write(extent << EXTENT_SHIFT, image)
            self._file.write(
                map_entry_offset(extent),
                SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, live, live, 0, earliest),
            )
            directory[prefix : prefix + run] = array("H", [extent]) * run
        self._file.write(DIRECTORY_OFFSET, directory.tobytes())

    def _find_room(self) -> list[tuple[int, int, int]]:
        """As `_lay_out`, giving up the newest records where the file may not grow for all of them.

        Raises:
            StoreFullError: the disk has no room for it. It may have at another time.
        """
        extents: list[int] = []
        try:
            return self._lay_out(extents)
        except StoreFullError as error:
            is_at_limit = self._file.extent_count >= self._file.max_extents
            if not is_at_limit or isinstance(error.__cause__, OSError):
                raise
        for extent in extents:
            with self._extents.lock, Rollback(self._file) as rollback:
                self._extents.free(extent, rollback)
        self._give_up_newest(len(extents))
        return self._lay_out([])

    def _give_up_newest(self, room: int) -> None:
        """Free the records that were created last, so that `room` extents do for the others.

        Together with the extents that this empties.
        """
        words, notes = self._file.words, self._notes
        times, entries = array("Q"), array("H")
        oldest: dict[int, int] = {}
        for word in notes.words():
            offset = word >> OFFSET_SHIFT & OFFSET_MASK
            created_at = words[offset + RECORD_CREATED_OFFSET >> 3]
            times.append(created_at)
            entries.append(word >> DIRECTORY_SHIFT)
            extent = offset >> EXTENT_SHIFT
            oldest[extent] = min(created_at, oldest.get(extent, created_at))

        def is_too_late(last: int) -> bool:
            counts = [0] * DIRECTORY_ENTRIES
            for created_at, entry in zip(times, entries, strict=True):
                counts[entry] += created_at <= last
            sums = list(accumulate(counts, initial=0))
            run = segment_run(MIN_DEPTH)
            needed = sum(_least(sums, start, run) for start in range(0, DIRECTORY_ENTRIES, run))
            return needed > room + sum(first > last for first in oldest.values())

        moments = sorted(set(times))
        first = moments[bisect_left(moments, True, key=is_too_late)]
        given_up = {
            word
            for word in notes.words()
            if words[(word >> OFFSET_SHIFT & OFFSET_MASK) + RECORD_CREATED_OFFSET >> 3] >= first
        }
        for word in sorted(given_up):
            self._slab.free(word >> OFFSET_SHIFT & OFFSET_MASK)
        self._slab.free_spare()
        notes.forget(given_up)
        self._records -= len(given_up)
        self._given_up += len(given_up)

    def _lay_out(self, extents: list[int]) -> list[tuple[int, int, int]]:
        """Cut the hashes into segments; return the extent, depth and prefix of each, in order.

        The fullest are halved first. Where extents run out, the others are filled beyond 7/8. Those
        that it takes it puts in `extents`.
        """
        run = segment_run(MIN_DEPTH)
        waiting = [
            (-self._notes.count(prefix, run), MIN_DEPTH, prefix)
            for prefix in range(0, DIRECTORY_ENTRIES, run)
        ]
        heapify(waiting)
        while len(extents) < len(waiting):
            extents.append(self._take_extent())
        segments: list[tuple[int, int]] = []
        while waiting:
            negative_count, depth, prefix = heappop(waiting)
            if -negative_count > SPLIT_AT and depth < MAX_DEPTH:
                try:
                    extents.append(self._take_extent())
                except StoreFullError:
                    if -negative_count > SEGMENT_SLOTS:
                        raise
                else:
                    half = segment_run(depth + 1)
                    for start in (prefix, prefix + half):
                        heappush(waiting, (-self._notes.count(start, half), depth + 1, start))
                    continue
            segments.append((prefix, depth))
        return [
            (extent, depth, prefix)
            for extent, (prefix, depth) in zip(sorted(extents), sorted(segments), strict=True)
        ]

    def _take_extent(self) -> int:
        with self._extents.lock, Rollback(self._file) as rollback:
            extent = self._extents.allocate(rollback)
            rollback.write(
                map_entry_offset(extent), SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 0, 0, 0, NO_EXPIRY)
            )
        return extent

    def _build_segment(self, extent: int, depth: int, prefix: int) -> tuple[bytes, int, int]:
        """Return a segment, its earliest expiry, and how many members it has."""
        members = self._members(prefix, segment_run(depth))
        return *build(extent, self._shape(depth, prefix), members), len(members)

    def _shape(self, depth: int, prefix: int) -> int:
        return bucket_shape(depth, prefix, self._rebuilds, 0)

    def _members(self, prefix: int, run: int) -> list[Member]:
        """Return the slots, to be, of the records whose hashes lead to `run` directory entries."""
        mapped, words = self._file.map, self._file.words
        pack, magic, header_size = SLOT_WORDS.pack, RECORD_MAGIC, RECORD_HEADER_SIZE
        size_shift, offset_shift, offset_mask = SLOT_KEY_SIZE_SHIFT, OFFSET_SHIFT, OFFSET_MASK
        expires_offset, any_expires = RECORD_EXPIRES_OFFSET, self._notes.any_expires
        members: list[Member] = []
        apart = 1 << UPPER_SHIFT  # those with equal uppermost bits are closer
        previous = -apart
        for word in chain.from_iterable(
            part[start:end] for part, start, end in self._notes.slices(prefix, run)
        ):
            offset = word >> offset_shift & offset_mask
            head = words[offset >> 3]
            expires_at = words[offset + expires_offset >> 3] if any_expires else NEVER
            key_start = offset + header_size
            key = mapped[key_start : key_start + (head >> size_shift)]
            # A note has those bits of the hash that `build` asks for. The sizes are in the same
            # place in header and slot: change the magic for the offset.
            members.append((word, expires_at, pack(key, expires_at, head - magic + offset)))
            if word - previous < apart:
                self._settle_last(members)
            previous = word
        if len(members) > SEGMENT_SLOTS:
            self._unplaced += len(members) - SEGMENT_SLOTS
            self._file.require_rebuild()
        return members[:SEGMENT_SLOTS]

    def _settle_last(self, members: list[Member]) -> None:
        """Where the last member is of the same key as one shortly before it, keep the newer.

        Only operations that were never flushed can have left both.
        """
        *_, (last_word, _, last_slot) = members
        for index in range(len(members) - 2, -1, -1):
            word, _, slot = members[index]
            differing = word ^ last_word
            if differing >> UPPER_SHIFT:
                return
            if not differing & HASH_MASK and self._key(slot) == self._key(last_slot):
                older = index if self._created_at(slot) < self._created_at(last_slot) else -1
                self._slab.free(SLOT.unpack(members.pop(older)[2])[2])
                self._records -= 1
                self._outdated += 1
                return

    def _key(self, slot: bytes) -> bytes:
        _, _, record, _, size = SLOT.unpack(slot)
        return self._slab.key_at(record, size)

    def _created_at(self, slot: bytes) -> int:
        created_at: int = RECORD.unpack_from(self._file.map, SLOT.unpack(slot)[2])[4]
        return created_at

    # --- what it says --------------------------------------------------------------------------

    def _show_progress(self, what: str, done: int, count: int, things: str) -> None:
        if monotonic() >= self._progress_due:
            self._progress_due = monotonic() + _PROGRESS_SECONDS
            logger.info(
                "%s: recovery has %s %d of %d %s, %d records so far",
                self._file.path,
                what,
                done,
                count,
                things,
                self._records,
            )

    def report(self, seconds: float) -> None:
        """Log what was found; nothing for a new file."""
        if self._records or self._expired or self._damaged or self._outdated:
            logger.warning(
                "%s: %s; rebuilt the index of %d records in %.2f s; "
                "dropped %d expired, %d outdated and %d damaged ones%s",
                self._file.path,
                self._file.distrust,
                self._records,
                seconds,
                self._expired,
                self._outdated,
                self._damaged,
                f", the first of these at byte {self._first_damaged:,}" if self._damaged else "",
            )
        if self._given_up:
            logger.error(
                "%s: after power loss, the file at its limit of %d extents had no room for the "
                "slots of all records; gave up the %d newest, which were not synced",
                self._file.path,
                self._file.max_extents,
                self._given_up,
            )
        if self._unplaced:
            logger.error(
                "%s: %d records have no slot, because one entry of the directory is full; delete "
                "others and open the store again",
                self._file.path,
                self._unplaced,
            )


class _CompiledRebuild(_Rebuild):
    """Likewise, with what is done for each record compiled: see `_rebuild.pyx`."""

    _kind_of_notes = CompiledFoundRecords
    _twin: Any = compiled_rebuild

    def _link_free_blocks(self, base: int, block_size: int, positions: "array[int]") -> int:
        first: int = self._twin.link_free_blocks(self._file.write, base, block_size, positions)
        return first

    def _build_segment(self, extent: int, depth: int, prefix: int) -> tuple[bytes, int, int]:
        slices = list(self._notes.slices(prefix, segment_run(depth)))
        built: tuple[bytes, int, int] | None = self._twin.build_segment(
            self._file.map, self._file.size, slices, extent, self._shape(depth, prefix)
        )
        return built or super()._build_segment(extent, depth, prefix)


def _least(sums: list[int], start: int, run: int) -> int:
    """Return how many segments the records of `run` directory entries need at least.

    `sums` has, for each entry, how many records lead to those before it.
    """
    if run == 1 or sums[start + run] - sums[start] <= SEGMENT_SLOTS:
        return 1
    half = run // 2
    return _least(sums, start, half) + _least(sums, start + half, half)


def _set_entry(
    entries: bytearray,
    extent: int,
    kind: int,
    blocks: tuple[int, int, int, int] = (0, 0, 0, 0),
    next_extent: int = NO_EXTENT,
) -> None:
    SLAB_ENTRY.pack_into(entries, 16 * extent, kind, *blocks, NO_EXTENT, next_extent, 0)
