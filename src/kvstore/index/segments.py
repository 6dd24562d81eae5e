"""The segments of the table, an extendible hash: split, merged, counted and gone through.

What an operation does with one slot is in `slots`, with the invariants. Unless they say otherwise,
the caller of these functions holds the stripe of the segment.

A position in the directory names the segment that covers it, however segments are split, merged and
moved meanwhile; an extent does so only while the stripe is held.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from kvstore.compiled import Implementation
from kvstore.errors import CorruptStoreError, KVStoreError, StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.bucket import live_slots
from kvstore.format.layout import (
    BUCKET_HEADER_SIZE,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    EARLIEST_OFFSET,
    EMPTY_BYTE,
    ENTRY_LIVE_SHIFT,
    ENTRY_USED_SHIFT,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_CODES,
    FINGERPRINT_SHIFT,
    KIND_SEGMENT,
    MAX_DEPTH,
    MIN_DEPTH,
    NO_EXPIRY,
    NO_EXTENT,
    REBUILDS_OFFSET,
    RECORD_EXPIRES_OFFSET,
    RECORD_HEADER_SIZE,
    SEGMENT_EARLIEST_OFFSET,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SHAPE_OFFSET,
    SLOT_COUNT,
    SLOT_EXPIRES_OFFSET,
    SLOT_FLAGS,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    STRIPE_COUNT,
    TOMBSTONE_BYTE,
    U16,
    U64,
    UNDONE_WORD,
    bucket_shape,
    key_hash,
    map_entry_offset,
    segment_run,
    slot_offset,
)

from .buckets import (
    advice,
    buckets,
    check_buckets,
    depth_and_prefix,
    is_torn,
    rewrites_after,
    torn_bucket_error,
)
from .extents import Extents
from .slab import Slab
from .slots import Slots, control_offset_of
from .versions import Versions

if TYPE_CHECKING:
    from kvstore.compiled.interface import Members

_COUNT_MASK: Final = 0xFFFF
_RUN_PER_STRIPE: Final = DIRECTORY_ENTRIES // STRIPE_COUNT
_CONTROL_END: Final = CONTROL_OFFSET + SLOT_COUNT
# Of a page, the sizes of the keys in its slots.
_KEY_SIZES: Final = slice(BUCKET_HEADER_SIZE + SLOT_KEY_SIZE_OFFSET, BUCKET_SIZE, SLOT_SIZE)


class Segments:
    """Splits, merges and goes through the segments of `file`, by one implementation.

    Made once the index of the file is there: it keeps how often that was rebuilt.
    """

    def __init__(
        self,
        file: DataFile,
        extents: Extents,
        slab: Slab,
        slots: Slots,
        versions: Versions,
        implementation: Implementation,
    ) -> None:
        self._file = file
        self._map = file.map
        self._words = file.words
        self._directory = file.directory
        self._extents = extents
        self._slab = slab
        self._slots = slots
        self._versions = versions
        self._implementation = implementation
        self._rebuilds = file.shorts[REBUILDS_OFFSET >> 1]

    def index_rebuilt(self) -> None:
        """Go on with an index that was built anew. The caller holds all stripes."""
        self._rebuilds = self._file.shorts[REBUILDS_OFFSET >> 1]
        self._slots.index_rebuilt()

    # --- rewritten -----------------------------------------------------------------------------

    def split_or_compact(self, hash_of_key: int, now_ms: int) -> bool:
        """Rewrite the segment of `hash_of_key` without tombstones and expired records.

        Into itself where the rest fits in half of it, else into two; where no extent is left for
        that, into itself if there was anything to drop. Takes the space lock.

        Returns:
            False where nothing could be done: the segment goes on filling.
        """
        position = hash_of_key >> DIRECTORY_SHIFT
        extent = self._directory[position]
        depth, prefix = depth_and_prefix(self._file, extent, position)
        if depth == MAX_DEPTH and not self._has_any_to_drop(extent, now_ms):
            return False
        lower, upper, expired, lost = self._partition_slots(extent, depth, prefix, now_ms)
        if lost:
            # Damaged slots: no lookup comes here for such keys. Their records, if whole, are found
            # when the index is next rebuilt.
            self._file.require_rebuild()
        count = sum(map(self._implementation.count_members, (lower, upper)))
        if count > SEGMENT_SLOTS // 2 and depth < MAX_DEPTH:
            try:
                self._split(extent, depth, prefix, lower, upper)
            except StoreFullError:
                pass
            else:
                self._free_records(expired)
                return True
        if count >= self._slots.used_slot_count(extent << EXTENT_SHIFT):
            return False
        rewrites = rewrites_after(self._file, extent, self._versions.words[UNDONE_WORD])
        try:
            with Rollback(self._file) as rollback:
                self._write_segment(extent, depth, prefix, rewrites, lower + upper, rollback)
        except BaseException:
            self._versions.words[UNDONE_WORD] += 1
            raise
        self._free_records(expired)
        return True

    def _partition_slots(
        self, extent: int, depth: int, prefix: int, now_ms: int
    ) -> "tuple[Members, Members, list[bytes], int]":
        """As `segment.partition_slots`, of a segment whose pages are checked first.

        This loop is what the slowest creates take their time for.
        """
        check_buckets(self._file, extent)
        return self._implementation.partition_slots(
            self._map, self._file.size, extent, depth, prefix, now_ms, self._file.hash_seed
        )

    def _has_any_to_drop(self, extent: int, now_ms: int) -> bool:
        """Return whether by its entry a segment has tombstones, or may hold expired slots."""
        # So that keys which all lead to one full segment are refused for little.
        _, _, live, used, _, earliest = SEGMENT_ENTRY.unpack_from(
            self._map, map_entry_offset(extent)
        )
        return bool(live != used or earliest <= now_ms)

    def _split(
        self, extent: int, depth: int, prefix: int, lower: "Members", upper: "Members"
    ) -> None:
        """Give the members with the upper half of a segment's hashes to a new one.

        Raises:
            StoreFullError: there is no extent for it; nothing has changed.
        """
        with self._extents.lock, Rollback(self._file) as rollback:
            upper_extent = self._extents.allocate(rollback, for_segment=True)
            rollback.write(
                map_entry_offset(upper_extent),
                SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 0, 0, 0, NO_EXPIRY),
            )
        half = segment_run(depth + 1)
        upper_prefix = prefix + half
        rewrites = rewrites_after(self._file, extent, self._versions.words[UNDONE_WORD])
        try:
            with Rollback(self._file) as rollback:
                self._write_segment(
                    upper_extent, depth + 1, upper_prefix, rewrites, upper, rollback
                )
                rollback.write(DIRECTORY_OFFSET + 2 * upper_prefix, U16.pack(upper_extent) * half)
                self._write_segment(extent, depth + 1, prefix, rewrites, lower, rollback)
        except BaseException:
            self._versions.words[UNDONE_WORD] += 1
            # Cut short after the last write, the split is complete.
            if self._directory[upper_prefix] != upper_extent:
                with self._extents.lock, Rollback(self._file) as rollback:
                    self._extents.free(upper_extent, rollback)
            raise

    # --- merged and moved ----------------------------------------------------------------------

    def is_mergeable(self, position: int, most: int = SEGMENT_SLOTS // 2) -> tuple[bool, int]:
        """Look whether the segment at a directory position and its buddy can be one.

        Returns:
            Whether `merge` would go about it; the position of the next segment.
        """
        following, damage = self._next_position(position)
        try:
            return not damage and self._find_buddies(position, most) is not None, following
        except CorruptStoreError:
            return False, following

    def merge(self, position: int, now_ms: int, most: int = SEGMENT_SLOTS // 2) -> bool:
        """Have the segment at a directory position and its buddy become one, in the lower's extent.

        Only where they are of one depth, and have together at most so many live slots. The upper's
        extent becomes free. Expired slots are dropped, as by a rewrite; where others are damaged,
        nothing is done. Takes the space lock.

        Returns:
            Whether they did.

        Raises:
            CorruptStoreError: a page of them is damaged; nothing has changed.
            StoreFullError, OSError: the disk refused a write; nothing has changed.
        """
        buddies = self._find_buddies(position, most)
        if buddies is None:
            return False
        depth, prefix, extents = buddies
        halves: list[Members] = []
        expired: list[bytes] = []
        for extent, first in zip(extents, (prefix, prefix + segment_run(depth)), strict=True):
            lower, upper, due, lost = self._partition_slots(extent, depth, first, now_ms)
            if lost:
                return False
            halves.append(lower + upper)
            expired += due
        members = halves[0] + halves[1]
        if self._implementation.count_members(members) > most:
            return False  # their entries say fewer
        rewrites = max(
            rewrites_after(self._file, extent, self._versions.words[UNDONE_WORD])
            for extent in extents
        )
        with self._counting_undone(), self._extents.lock, Rollback(self._file) as rollback:
            lower_extent, upper_extent = extents
            self._write_segment(lower_extent, depth - 1, prefix, rewrites, members, rollback)
            self._lead_to(lower_extent, depth - 1, prefix, upper_extent, rollback)
        self._free_records(expired)
        return True

    def _find_buddies(self, position: int, most: int) -> tuple[int, int, tuple[int, int]] | None:
        """Return depth, prefix and extents, lower first, of two segments that `merge` is for."""
        depth, prefix = depth_and_prefix(self._file, self._directory[position], position)
        if depth == MIN_DEPTH:
            return None
        run = segment_run(depth)
        prefix &= ~run
        extents = self._directory[prefix], self._directory[prefix + run]
        for extent, first in zip(extents, (prefix, prefix + run), strict=True):
            if depth_and_prefix(self._file, extent, first) != (depth, first):
                return None
        live = sum(
            self._words[map_entry_offset(extent) >> 3] >> ENTRY_LIVE_SHIFT & _COUNT_MASK
            for extent in extents
        )
        return (depth, prefix, extents) if live <= most else None

    def relocate(self, position: int, before: int, now_ms: int) -> bool:
        """Move the segment at a directory position to a free extent before extent `before`.

        The one that it was in becomes free. Expired slots are dropped, as by a rewrite; where
        others are damaged, nothing is done. Takes the space lock.

        Returns:
            Whether it was moved.

        Raises:
            CorruptStoreError: a page of it is damaged; nothing has changed.
            StoreFullError, OSError: the disk refused a write; nothing has changed.
        """
        extent = self._directory[position]
        depth, prefix = depth_and_prefix(self._file, extent, position)
        lower, upper, expired, lost = self._partition_slots(extent, depth, prefix, now_ms)
        if lost:
            return False
        rewrites = rewrites_after(self._file, extent, self._versions.words[UNDONE_WORD])
        with self._counting_undone(), self._extents.lock, Rollback(self._file) as rollback:
            target = self._extents.allocate_before(before, rollback)
            if target == NO_EXTENT:
                return False
            self._write_segment(target, depth, prefix, rewrites, lower + upper, rollback)
            self._lead_to(target, depth, prefix, extent, rollback)
        self._free_records(expired)
        return True

    @contextmanager
    def _counting_undone(self) -> Iterator[None]:
        """Count a rewrite that is taken back: pages may show it in a copy."""
        try:
            yield
        except BaseException:
            self._versions.words[UNDONE_WORD] += 1
            raise

    def _lead_to(
        self, extent: int, depth: int, prefix: int, given_up: int, rollback: Rollback
    ) -> None:
        """Have the directory name `extent`, written whole, for all that `given_up` had; free that.

        The caller holds the space lock, from before the first write through `rollback` on: nobody
        takes an extent that may be taken back.
        """
        run = segment_run(depth)
        rollback.write(DIRECTORY_OFFSET + 2 * prefix, U16.pack(extent) * run)
        # No page of it must be taken for a bucket once more.
        rollback.write(given_up << EXTENT_SHIFT, bytes(EXTENT_SIZE))
        self._extents.free(given_up, rollback)

    def _write_segment(
        self,
        extent: int,
        depth: int,
        prefix: int,
        rewrites: int,
        members: "Members",
        rollback: Rollback,
    ) -> None:
        shape = bucket_shape(depth, prefix, self._rebuilds, rewrites)
        image, earliest = self._implementation.build_segment(extent, shape, members)
        count = self._implementation.count_members(members)
        rollback.write(extent << EXTENT_SHIFT, image)
        rollback.write(
            map_entry_offset(extent),
            SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, count, count, 0, earliest),
        )

    def _free_records(self, slots: list[bytes]) -> None:
        """Free or mark the records of slots that are no longer in the table."""
        records = []
        for slot in slots:
            record = self._slots.slot_record(slot)
            (tail,) = U64.unpack_from(slot, SLOT_RECORD_OFFSET)
            if not record:
                self._file.require_rebuild()
                self._versions.leaks = True
            elif tail & SLOT_FLAGS:
                self._release(tail, self._slots.slot_key(slot))
            else:
                records.append(record)
        self._slab.free_soon(records)

    def _release(self, tail: int, key: bytes) -> None:
        """As `Slots.release`; where that fails, the next opening does it."""
        try:
            self._slots.release(tail, key)
        except (KVStoreError, OSError):
            self._file.require_rebuild()
            self._versions.leaks = True

    # --- gone through --------------------------------------------------------------------------

    def segments(self, stripe: int) -> Iterator[int]:
        """Yield the extents of a stripe's segments. The caller holds the stripe throughout."""
        position = stripe * _RUN_PER_STRIPE
        while position < (stripe + 1) * _RUN_PER_STRIPE:
            extent = self._directory[position]
            yield extent
            position += segment_run(depth_and_prefix(self._file, extent, position)[0])

    def segment_keys(self, position: int, now_ms: int) -> tuple[list[bytes], int, list[str]]:
        """Copy the keys from directory entry `position` to the end of the segment it leads to.

        That may begin before, for segments merge: what is there was another call's.

        Returns:
            The keys that have not expired; the position of the next segment; what is wrong where
            damage keeps a key from being told, in words.
        """
        following, damage = self._next_position(position)
        if damage:
            return [], following, [damage]
        found = list(self._keys(position, now_ms))
        keys = [key for key, damage in found if not damage]
        return keys, following, [damage for _, damage in found if damage]

    def copy_segment(self, position: int) -> tuple[bytes, dict[int, bytes], range]:
        """Copy the segment that directory entry `position` leads to, to be looked at without locks.

        Returns:
            Its pages; by the offset of their slots in these, the keys that a slot holds only the
            beginning of; the directory positions that lead to it.

        Raises:
            CorruptStoreError: its pages are not those of one segment, or some of its keys are gone.
        """
        file, extent = self._file, self._directory[position]
        depth, prefix = depth_and_prefix(file, extent, position)
        check_buckets(file, extent)
        pages = self._map[extent << EXTENT_SHIFT : (extent + 1) << EXTENT_SHIFT]
        long_keys: dict[int, bytes] = {}
        live = 0
        for bucket in range(0, EXTENT_SIZE, BUCKET_SIZE):
            page = pages[bucket : bucket + BUCKET_SIZE]
            control = page[CONTROL_OFFSET:_CONTROL_END]
            live += SLOT_COUNT - control.count(EMPTY_BYTE) - control.count(TOMBSTONE_BYTE)
            if max(page[_KEY_SIZES]) > SLOT_KEY_SIZE:
                for index, _, slot in live_slots(page):
                    if slot[SLOT_KEY_SIZE_OFFSET] > SLOT_KEY_SIZE:
                        long_keys[slot_offset(bucket, index)] = self._slots.slot_key(slot)
        entry = self._words[map_entry_offset(extent) >> 3]
        if live != entry >> ENTRY_LIVE_SHIFT & _COUNT_MASK and not file.read_only:
            raise self._count_error(extent, entry >> ENTRY_LIVE_SHIFT & _COUNT_MASK, live)
        return pages, long_keys, range(prefix, prefix + segment_run(depth))

    def any_key(self, position: int, now_ms: int) -> tuple[str | None, int, str]:
        """As `segment_keys`, but one key that a lookup finds, or None, and what is wrong first."""
        following, first_damage = self._next_position(position)
        entry = self._words[map_entry_offset(self._directory[position]) >> 3]
        if not first_damage and entry >> ENTRY_LIVE_SHIFT & _COUNT_MASK:
            for key, damage in self._keys(position, now_ms):
                if not damage and self._slots.find(key_hash(key, self._file.hash_seed), key) > 0:
                    with suppress(UnicodeDecodeError):
                        return key.decode(), following, ""
                first_damage = first_damage or damage or _astray(self._file, key)
        return None, following, first_damage

    def _next_position(self, position: int) -> tuple[int, str]:
        """Return the position of the next segment, and what is wrong with this one, in words."""
        try:
            depth, prefix = depth_and_prefix(self._file, self._directory[position], position)
        except CorruptStoreError as error:
            return self.end_of_run(position), str(error)
        return prefix + segment_run(depth), ""

    def _keys(self, position: int, now_ms: int) -> Iterator[tuple[bytes, str]]:
        """Yield the keys of a segment from a position on; or what keeps one from being told.

        Those that have not expired.
        """
        extent = self._directory[position]
        depth, prefix = depth_and_prefix(self._file, extent, position)
        first = extent << EXTENT_SHIFT
        shape = self._words[first + SHAPE_OFFSET >> 3]
        for bucket in range(first, first + EXTENT_SIZE, BUCKET_SIZE):
            if is_torn(self._file, bucket, shape):  # a key may be in another bucket besides
                yield b"", str(torn_bucket_error(self._file, bucket, shape))
                continue
            for index, expires_at, slot in live_slots(self._map[bucket : bucket + BUCKET_SIZE]):
                if expires_at and self._slots.is_expired(slot_offset(bucket, index), now_ms):
                    continue
                key = self._slots.slot_key(slot)
                # A damaged slot, or record of a long key, must not make up a key or repeat one.
                hash_of_key = key_hash(key, self._file.hash_seed)
                control = self._map[control_offset_of(slot_offset(bucket, index))]
                if (
                    key[:SLOT_KEY_SIZE] == slot[: min(len(key), SLOT_KEY_SIZE)]
                    and hash_of_key >> DIRECTORY_SHIFT & -segment_run(depth) == prefix
                    and control == FINGERPRINT_CODES[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]
                ):
                    if hash_of_key >> DIRECTORY_SHIFT >= position:
                        yield key, ""
                else:
                    damage = (
                        f"{self._file.path}: slot {index} of the bucket at byte {bucket:,} names a "
                        f"key whose hash does not lead there; slot or record is damaged"
                    )
                    yield b"", damage

    def segment_expiry(self, position: int, now_ms: int) -> tuple[int, int, bool]:
        """Look at the segment that directory entry `position` leads to.

        Returns:
            Its extent, the position of the next segment, and whether it may hold expired slots.
        """
        extent = self._directory[position]
        depth, prefix = depth_and_prefix(self._file, extent, position)
        earliest = self._words[map_entry_offset(extent) + SEGMENT_EARLIEST_OFFSET >> 3]
        return extent, prefix + segment_run(depth), earliest <= now_ms

    def earliest_expiry(self, extent: int) -> int:
        """Return the earliest expiry in a segment; never later than the true one."""
        return self._words[map_entry_offset(extent) + SEGMENT_EARLIEST_OFFSET >> 3]

    def end_of_run(self, position: int) -> int:
        """Return where the directory next names another extent than at `position`."""
        extent = self._directory[position]
        while position < DIRECTORY_ENTRIES and self._directory[position] == extent:
            position += 1
        return position

    def count(self, extent: int, now_ms: int) -> int:
        """Return how many keys of a segment have not expired."""
        entry_offset = map_entry_offset(extent)
        entry = self._words[entry_offset >> 3]
        live, used = (
            entry >> ENTRY_LIVE_SHIFT & _COUNT_MASK,
            entry >> ENTRY_USED_SHIFT & _COUNT_MASK,
        )
        if not live <= used <= SEGMENT_SLOTS:
            raise CorruptStoreError(
                f"{self._file.path}: the entry of extent {extent} at byte {entry_offset:,} says "
                f"that it is a segment of {live} live and {used} used slots of {SEGMENT_SLOTS:,}"
            )
        if self._words[entry_offset + SEGMENT_EARLIEST_OFFSET >> 3] > now_ms:
            return live
        found = due = 0
        for bucket in buckets(self._file, extent):
            control = self._map[bucket + CONTROL_OFFSET : bucket + _CONTROL_END]
            found += SLOT_COUNT - control.count(EMPTY_BYTE) - control.count(TOMBSTONE_BYTE)
            due += self._count_due(bucket, now_ms)
        if found != live:  # as in a copy whose pages are of another moment than the extent map
            raise self._count_error(extent, live, found)
        return live - due

    def _count_error(self, extent: int, live: int, found: int) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self._file.path}: the entry of extent {extent} at byte "
            f"{map_entry_offset(extent):,} says that it is a segment of {live} live slots, but it "
            f"has {found}; {advice(self._file)}"
        )

    def _count_due(self, bucket: int, now_ms: int) -> int:
        """Return how many slots of a bucket `is_expired` holds of: a sixth of asking it of each."""
        words, last_record = self._words, self._file.size - RECORD_HEADER_SIZE
        if words[bucket + EARLIEST_OFFSET >> 3] > now_ms:
            return 0
        slots = words[bucket + BUCKET_HEADER_SIZE >> 3 : bucket + BUCKET_SIZE >> 3]
        return sum(
            control > CONTROL_TOMBSTONE
            and 0 < expires_at <= now_ms
            and (record := tail & SLOT_RECORD_MASK) <= last_record
            and words[record + RECORD_EXPIRES_OFFSET >> 3] == expires_at
            for control, expires_at, tail in zip(
                self._map[bucket + CONTROL_OFFSET : bucket + _CONTROL_END],
                slots[SLOT_EXPIRES_OFFSET >> 3 :: SLOT_SIZE >> 3].tolist(),
                slots[SLOT_RECORD_OFFSET >> 3 :: SLOT_SIZE >> 3].tolist(),
                strict=True,
            )
        )

    def _due(self, extent: int, now_ms: int) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
        """Yield each bucket of a segment that may hold expired slots, with offsets and bytes."""
        for bucket in buckets(self._file, extent):
            if self._words[bucket + EARLIEST_OFFSET >> 3] <= now_ms:
                page = self._map[bucket : bucket + BUCKET_SIZE]
                offsets = (
                    (slot_offset(bucket, index), slot)
                    for index, expires_at, slot in live_slots(page)
                    if expires_at
                )
                yield bucket, [due for due in offsets if self._slots.is_expired(due[0], now_ms)]

    def purge(self, extent: int, now_ms: int) -> int:
        """Remove a segment's expired slots, free their records, and return their number."""
        entry_offset = map_entry_offset(extent)
        if self._words[entry_offset + SEGMENT_EARLIEST_OFFSET >> 3] > now_ms:
            return 0
        purged = 0
        for bucket, due in self._due(extent, now_ms):
            for offset, slot in due:
                self._slots.delete(offset, self._slots.slot_key(slot))
                self._file.require_full_flush()
            purged += len(due)
            page = self._map[bucket : bucket + BUCKET_SIZE]
            left = (expires_at for _, expires_at, _ in live_slots(page) if expires_at)
            self._file.write(bucket + EARLIEST_OFFSET, U64.pack(min(left, default=NO_EXPIRY)))
        earliest = min(
            self._words[bucket + EARLIEST_OFFSET >> 3] for bucket in buckets(self._file, extent)
        )
        self._file.write(entry_offset + SEGMENT_EARLIEST_OFFSET, U64.pack(earliest))
        return purged


def _astray(file: DataFile, key: bytes) -> str:
    """Return what is wrong where a slot has a key that a lookup does not find."""
    return f"{file.path}: the slot of key {key!r} is where no lookup finds it; {advice(file)}"
