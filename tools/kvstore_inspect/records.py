"""Every record of a file, one after the other, and every one that is damaged.

A file that was closed in order is read by its index; then whatever is whole and in no slot, which
only damage can have led to. One that was not is read without the index, record by record, as the
store's next opening would: of each key the record with the latest stamp counts, and none where that
is marked as deleted. One that is in use is read by the index as well, looking again at what does
not fit, because it may just be changing.

Of the file no more than an extent is in memory at a time; beside it a bit for each block of 32
bytes, or 8 bytes for each record of a file that was not closed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from kvstore.format.bucket import live_slots
from kvstore.format.codec import parse
from kvstore.format.extent_records import classify
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_HEADER,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    CONTROL_EMPTY,
    CONTROL_OFFSET,
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    DIRECTORY_SIZE,
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_SHIFT,
    FINGERPRINTS,
    FIXED_EXTENTS,
    MARKED_MAGIC,
    MARKED_MAGIC_BYTES,
    MAX_DEPTH,
    MIN_DEPTH,
    NEVER,
    RECORD,
    RECORD_HEADER_SIZE,
    RECORD_MAGIC,
    SLOT_KEY_SIZE,
    STAMP_SHIFT,
    bucket_marker,
    key_hash,
    map_entry_offset,
    record_checksum,
    segment_run,
    slot_offset,
)
from kvstore.format.quick_check import count_by_map
from kvstore.format.records import is_valid_record, magics, size_class_at

from .file_view import FileView
from .table import is_bucket, key_in, shape, slot_key, slots_of, unpack_slot
from .versions import BlockSet, Retired, find_losers, slab_extents, stamp_at, void_stamp


class Record(NamedTuple):
    """A whole record. Times are milliseconds since 1970 UTC; `expires_at` is 0 for never.

    `offset` is 0 where it is in no file yet; `slot` is the offset of the slot that points to it, 0
    where none does, or none was looked for.
    """

    key: str
    value: bytes
    created_at: int
    expires_at: int
    offset: int = 0
    slot: int = 0

    def has_expired(self, now_ms: int) -> bool:
        """Return whether its time-to-live has passed."""
        return NEVER < self.expires_at <= now_ms

    def parsed(self) -> object:
        """Return the value as Python has it."""
        return parse(self.value)


@dataclass(frozen=True, slots=True)
class DamagedRecord:
    """Something that should be a record, or lead to some: where, of which key if that is known."""

    offset: int
    key: str | None
    message: str


Found = Record | DamagedRecord
Progress = Callable[[int, int], object]

# How often a record may be another one at each look before it is given up.
_MOST_CHANGES: Final = 20


def no_progress(_done: int, _whole: int) -> None:
    """Show nothing."""


class Records:
    """The records of an view, those that have expired included.

    Args:
        view: an open file.
        progress: called with how much of the way is done, and the whole of it.

    Attributes:
        by_index: whether the index is used; may be changed before the records are asked for.
        retired: without the index, what was passed over: superseded, void, or marked as deleted.
        strays: likewise, whole records of another size class than their extent's.
    """

    def __init__(self, view: FileView, progress: Progress = no_progress) -> None:
        self._view = view
        self._progress = progress
        if view.in_use and not view.trusted:
            view.look_again()  # somebody may have begun to change it since
        self.by_index = view.trusted or (view.in_use and not view.state.clean)
        self.retired: list[Retired] = []
        self.strays = 0

    def __iter__(self) -> Iterator[Found]:
        for problem in self._view.problems:
            yield DamagedRecord(0, None, problem)
        if not self.by_index:
            yield from self._without_index()
            return
        whole = damaged = 0
        for found in self._by_index():
            whole += isinstance(found, Record)
            damaged += isinstance(found, DamagedRecord)
            yield found
        # A record may be lost with its slot, and then nothing names it.
        count = None if self._view.in_use or damaged else records_at_close(self._view)
        if count is not None and whole < count:
            yield DamagedRecord(
                EXTENT_MAP_OFFSET, None, f"records that are nowhere: {count - whole:,}"
            )

    def find(self, key: str) -> Found | None:
        """Return the record of `key`, or what is damaged of it; None where it is absent."""
        if not self.by_index:
            wanted = (found for found in self if isinstance(found, Record) and found.key == key)
            return next(wanted, None)
        return self._look_up(key.encode())

    # --- by the index --------------------------------------------------------------------------

    def _by_index(self) -> Iterator[Found]:
        view = self._view
        seen = BlockSet(view.extent_count)
        whole_way = DIRECTORY_ENTRIES + (0 if view.in_use else view.extent_count)
        for position, extent, contents, damage in self.segments():
            self._progress(position, whole_way)
            if damage:
                yield damage
                continue
            for slot, packed in slots_of(extent, contents):
                found = self._record_of(slot, packed)
                if found is None:  # deleted, or its segment was written whole elsewhere
                    found = self._look_up(self._key_of(packed))
                if isinstance(found, Record):
                    seen.add(found.offset)
                if found is not None:
                    yield found
        if not view.in_use:
            for extent in slab_extents(view):
                self._progress(DIRECTORY_ENTRIES + extent, whole_way)
                yield from self._without_slot(extent, seen)

    def segments(self) -> Iterator[tuple[int, int, bytes, DamagedRecord | None]]:
        """Yield each segment: directory position, extent, contents; or what is damaged of it.

        Each extent comes once, whatever the directory says; but for a file in use, whose segments
        split and merge meanwhile: there each key comes once that is there throughout.
        """
        seen: set[int] = set()
        position = 0
        while position < DIRECTORY_ENTRIES:
            for _ in self._view.looks():
                extent = self._directory_entry(position)
                contents = self._view.extent(extent)
                damage = self._segment_damage(position, extent, contents)
                if damage is None and not (
                    self._view.in_use and contents != self._view.extent(extent)
                ):
                    break
            if extent in seen and not self._view.in_use:
                damage = damage or DamagedRecord(
                    DIRECTORY_OFFSET + 2 * position,
                    None,
                    f"the directory's entry {position} leads to extent {extent}, as others do",
                )
            seen.add(extent)
            if damage is None:
                _, _, depth, prefix, *_ = BUCKET_HEADER.unpack_from(contents)
                if prefix < position:
                    contents = self._keys_from(position, contents)
                yield position, extent, contents, None
                position = prefix + segment_run(depth)
            else:
                yield position, extent, contents, damage
                position = self._end_of_run(position, extent)

    def _keys_from(self, position: int, contents: bytes) -> bytes:
        """Return what a segment has from a directory position on; what is before came already."""
        changed = bytearray(contents)
        for page in range(0, EXTENT_SIZE, BUCKET_SIZE):
            for index, _, packed in live_slots(contents[page : page + BUCKET_SIZE]):
                key = self._key_of(packed)
                if key_hash(key, self._view.seed) >> DIRECTORY_SHIFT < position:
                    changed[page + CONTROL_OFFSET + index] = CONTROL_EMPTY
        return bytes(changed)

    def _key_of(self, packed: bytes) -> bytes:
        """Return the key of a slot; the end of a long one as its record has it."""
        slot = unpack_slot(packed)
        if slot.key_size <= SLOT_KEY_SIZE:
            return slot.start[: slot.key_size]
        return self._view.read(slot.record + RECORD_HEADER_SIZE, slot.key_size)

    def _directory_entry(self, position: int) -> int:
        offset = DIRECTORY_OFFSET + 2 * position
        return int.from_bytes(self._view[offset : offset + 2], "little")

    def _end_of_run(self, position: int, extent: int) -> int:
        directory = self._view[DIRECTORY_OFFSET : DIRECTORY_OFFSET + DIRECTORY_SIZE]
        wanted = extent.to_bytes(2, "little")
        position += 1  # also where the file ends within the entry
        while directory[2 * position : 2 * position + 2] == wanted:
            position += 1
        return position if directory[2 * position :] else DIRECTORY_ENTRIES

    def _segment_damage(self, position: int, extent: int, contents: bytes) -> DamagedRecord | None:
        where = DIRECTORY_OFFSET + 2 * position
        if not FIXED_EXTENTS <= extent < self._view.extent_count or len(contents) < EXTENT_SIZE:
            return DamagedRecord(
                where, None, f"the directory's entry {position} leads to extent {extent}"
            )
        marker, _, depth, prefix, *_ = BUCKET_HEADER.unpack_from(contents)
        base = extent << EXTENT_SHIFT
        if marker != bucket_marker(base):
            return DamagedRecord(base, None, f"the directory leads to extent {extent}, no segment")
        is_depth = MIN_DEPTH <= depth <= MAX_DEPTH
        # Of a file in use, what was two segments may have become one.
        first = position & -segment_run(depth) if is_depth and self._view.in_use else position
        if not is_depth or prefix != first:
            return DamagedRecord(
                base, None, f"the segment says depth {depth} and prefix {prefix} at {position}"
            )
        for number in range(1, BUCKET_COUNT):
            bucket = base + number * BUCKET_SIZE
            if not is_bucket(contents[number * BUCKET_SIZE :], bucket):
                return _marker_error(bucket)
            if shape(contents, number * BUCKET_SIZE) != shape(contents):
                return DamagedRecord(
                    bucket, None, "a page of the table is of another moment than others"
                )
        return None

    def _record_of(self, slot: int, packed: bytes) -> Found | None:
        """Return the record that a slot points to, or what is wrong; None: it was just deleted.

        A key that is replaced all the time may be amid that at each look. What does not fit is
        damage only if the slot and its record are the same at two looks.
        """
        found: Found = DamagedRecord(slot, None, "its record is replaced too fast to be read")
        for _ in range(_MOST_CHANGES):
            seen = b""
            for look in self._view.looks():
                if look:
                    again = self._slot_again(slot, packed)
                    if again is None:
                        return None
                    packed = again
                before, (found, contents) = seen, self._record_at(slot, packed)
                seen = packed + contents
                if isinstance(found, Record):
                    if look:
                        self._view.hope_again()
                    return found
            if not look or seen == before:
                break
        return found

    def _slot_again(self, slot: int, packed: bytes) -> bytes | None:
        """Return the bytes of a slot as it is by now; None where it is that key's no more."""
        bucket = slot & -BUCKET_SIZE
        page = self._view[bucket : bucket + BUCKET_SIZE]
        if not is_bucket(page, bucket):
            return None
        live = {slot_offset(bucket, index): packed for index, _, packed in live_slots(page)}
        again = live.get(slot)
        return again if again and key_in(again) == key_in(packed) else None

    def _record_at(self, slot: int, packed: bytes) -> tuple[Found, bytes]:
        """Return the record that the bytes of a slot tell of, or what is wrong; and its bytes."""
        start, expires_at, offset, value_size, key_size = unpack_slot(packed)
        size = RECORD_HEADER_SIZE + key_size + value_size
        contents = self._view.read(offset, size)
        if offset < FIXED_EXTENTS * EXTENT_SIZE or len(contents) < size or not key_size:
            message = f"its slot points to byte {offset:,}, which no record is at"
            return DamagedRecord(slot, _legible(start, key_size, b""), message), contents
        magic, values, keys, generation, stamp, expires, checksum = RECORD.unpack_from(contents)
        key = contents[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + key_size]
        value = contents[RECORD_HEADER_SIZE + key_size :]
        if magic not in (RECORD_MAGIC, MARKED_MAGIC) or values != value_size or keys != key_size:
            message = "its record's magic or sizes are damaged"
        elif magic == MARKED_MAGIC or generation:
            message = "its slot leads to a record that was superseded or deleted"
        elif slot_key(key) != start or expires != expires_at:
            message = "its slot and its record do not agree"
        elif checksum != record_checksum(
            value, key_hash(key, self._view.seed), stamp, expires, offset
        ):
            message = "its record fails its checksum"
        else:
            return _record(key, value, stamp, expires, offset, slot), contents
        return DamagedRecord(offset, _legible(start, key_size, key), message), contents

    def _without_slot(self, extent: int, seen: BlockSet) -> Iterator[Found]:
        """Yield whole records of an extent that were not seen, but for older ones of a key."""
        base = extent << EXTENT_SHIFT
        contents = self._view.extent(extent)
        for position in magics(contents):
            if base + position in seen or size_class_at(contents, position) < 0:
                continue
            if contents.startswith(MARKED_MAGIC_BYTES, position):
                continue  # its key was deleted
            if is_valid_record(contents, position, base, self._view.seed):
                key, _ = _key_and_value(contents, position)
                found = self._look_up(key)
                # One that is found was passed over with the damaged segment that its slot is in.
                if not isinstance(found, Record) or found.offset == base + position:
                    yield _unpack(contents, position, base)

    def _look_up(self, key: bytes) -> Found | None:
        """Find a key as the store does."""
        for _ in self._view.looks():
            found = self._probe(key, key_hash(key, self._view.seed))
            if isinstance(found, Record):
                break
        return found

    def _probe(self, key: bytes, hash_of_key: int) -> Found | None:
        base = self._directory_entry(hash_of_key >> DIRECTORY_SHIFT) << EXTENT_SHIFT
        home = hash_of_key & BUCKET_COUNT - 1
        fingerprint = FINGERPRINTS[hash_of_key >> FINGERPRINT_SHIFT & 0xFF]
        damage: DamagedRecord | None = None
        for step in range(BUCKET_COUNT):
            bucket = base + ((home + step) % BUCKET_COUNT << BUCKET_SHIFT)
            page = self._view[bucket : bucket + BUCKET_SIZE]
            if not is_bucket(page, bucket):
                return _marker_error(bucket)
            control = BUCKET_HEADER.unpack_from(page)[-1]
            for index, _, packed in live_slots(page):
                start, _, _, _, size = unpack_slot(packed)
                if (
                    control[index : index + 1] == fingerprint
                    and size == len(key)
                    and start == slot_key(key)
                ):
                    found = self._record_of(slot_offset(bucket, index), packed)
                    if isinstance(found, DamagedRecord):
                        damage = damage or found
                    elif found is not None and found.key.encode() == key:
                        return found
            if CONTROL_EMPTY in control:
                break
        return damage

    # --- without the index ---------------------------------------------------------------------

    def _without_index(self) -> Iterator[Found]:
        view, count = self._view, self._view.extent_count
        losers = find_losers(view, lambda extent: self._progress(extent, 2 * count))
        void = void_stamp(view.state)
        for extent in slab_extents(view):
            self._progress(count + extent, 2 * count)
            base = extent << EXTENT_SHIFT
            contents = view.padded_extent(extent)
            scan = classify(contents, base, view.seed)
            self.strays += len(scan.outdated)
            superseded = marked = 0
            for position in scan.whole:
                if base + position in losers or stamp_at(contents, position) <= void:
                    superseded += 1
                elif contents.startswith(MARKED_MAGIC_BYTES, position):
                    marked += 1
                else:
                    yield _unpack(contents, position, base)
            if superseded or marked:
                self.retired.append(Retired(extent, scan.winner, superseded + marked, marked))
            for position in scan.damaged:
                yield DamagedRecord(
                    base + position, None, "a record that is damaged, or half written"
                )


def records_at_close(view: FileView) -> int | None:
    """Return how many records the file had when it was closed; None where it does not say."""
    if view.state.clean:
        return view.state.records
    # As an opening does: where the state is damaged, the file may have been cut off.
    size = map_entry_offset(EXTENT_MAP_ENTRIES)
    start = view.exactly(0, size)
    count = -1 if view.state.intact else count_by_map(start, EXTENT_MAP_ENTRIES)
    return count if count >= 0 else None  # there was no crash to leave a wrong state


def _legible(start: bytes, key_size: int, key: bytes) -> str | None:
    """Return the key of a slot, whose record has `key`; None where that is not known."""
    if key_size <= SLOT_KEY_SIZE:
        return start[:key_size].decode(errors="replace")
    return key.decode(errors="replace") if key[:SLOT_KEY_SIZE] == start else None


def _marker_error(bucket: int) -> DamagedRecord:
    return DamagedRecord(bucket, None, "a page of the table has no marker")


def _key_and_value(contents: bytes, position: int) -> tuple[bytes, bytes]:
    """Return key and value of the whole record at `position`."""
    _, value_size, key_size, *_ = RECORD.unpack_from(contents, position)
    start = position + RECORD_HEADER_SIZE
    value_start = start + key_size
    return contents[start:value_start], contents[value_start : value_start + value_size]


def _unpack(contents: bytes, position: int, base: int) -> Found:
    """Return the whole record at `position` of the bytes that begin at file offset `base`."""
    _, _, _, _, stamp, expires_at, _ = RECORD.unpack_from(contents, position)
    key, value = _key_and_value(contents, position)
    return _record(key, value, stamp, expires_at, base + position, 0)


def _record(key: bytes, value: bytes, stamp: int, expires_at: int, offset: int, slot: int) -> Found:
    try:
        return Record(key.decode(), value, stamp >> STAMP_SHIFT, expires_at, offset, slot)
    except UnicodeDecodeError as error:
        return DamagedRecord(offset, None, f"its key is no UTF-8: {error}")
