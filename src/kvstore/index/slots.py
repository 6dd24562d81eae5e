"""The slots of the table: found, filled and emptied one at a time.

Invariants, of a segment under its stripe:
1. A control byte is stored after everything else of its slot, and taken away before anything else.
2. A bucket with an empty slot has no tombstone, and no probe that began before it has gone past it
   since the segment was last written whole: a bucket that is full stays without an empty slot.
3. All buckets of a segment have one shape, which no page at their places had before it was last
   written whole. What follows from it for a copy that was torn while it was made: see `layout`.
4. The counts in the segment's entry of the extent map equal its control bytes; "earliest expiry" of
   bucket and segment is never later than the true one.

`key_hash >> STRIPE_SHIFT` names the stripe that covers a segment, its entry in the extent map, its
entries in the directory, and the records its slots point to. Unless they say otherwise, the caller
of these functions holds it.
"""

from typing import TYPE_CHECKING, Final

from kvstore.file.datafile import DataFile
from kvstore.format.layout import (
    BUCKET_COUNT,
    BUCKET_HEADER_SIZE,
    BUCKET_MARKER,
    BUCKET_SHIFT,
    BUCKET_SIZE,
    CONTROL_OFFSET,
    CONTROL_TOMBSTONE,
    DIRECTORY_SHIFT,
    EARLIEST_OFFSET,
    EMPTY_BYTE,
    ENTRY_LIVE_ONE,
    ENTRY_USED_ONE,
    ENTRY_USED_SHIFT,
    EXTENT_MAP_OFFSET,
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FINGERPRINT_SHIFT,
    FINGERPRINTS,
    MARKED_MAGIC,
    SEGMENT_EARLIEST_OFFSET,
    SHAPE_OFFSET,
    SHAPE_PREFIX_SHIFT,
    SLOT,
    SLOT_COUNT,
    SLOT_ENDING,
    SLOT_EXPIRES_OFFSET,
    SLOT_FLAGS,
    SLOT_KEY_SIZE,
    SLOT_KEY_SIZE_OFFSET,
    SLOT_KEY_SIZE_SHIFT,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SLOT_SIZE,
    SLOT_VALUE_SIZE_SHIFT,
    STRIPE_SHIFT,
    TOMBSTONE_BYTE,
    U64,
    key_hash,
)

from .buckets import SHAPE_MASKS, torn_bucket_error, wanted_shape, wrong_bucket_error
from .records import Records
from .slab import Slab
from .versions import Versions

if TYPE_CHECKING:
    from kvstore.compiled.interface import FastPath

_COUNT_MASK: Final = 0xFFFF
_CONTROL_END: Final = CONTROL_OFFSET + SLOT_COUNT
# Of a hash, what its stripe, its home bucket and its fingerprint are made of.
_PLACING_BITS: Final = 0xF << STRIPE_SHIFT | 0xFF << FINGERPRINT_SHIFT | BUCKET_COUNT - 1


class Slots:
    """Finds, inserts and removes slots of `file`.

    Made once the index of the file is there: it keeps how often that was rebuilt.
    """

    def __init__(self, file: DataFile, slab: Slab, records: Records, versions: Versions) -> None:
        self._file = file
        self._map = file.map
        self._words = file.words
        self._directory = file.directory
        self._slab = slab
        self._records = records
        self._versions = versions
        self._wanted_shape = wanted_shape(file)
        self.fast: FastPath | None = None  # of the store, once it is open

    def index_rebuilt(self) -> None:
        """Go on with an index that was built anew. The caller holds all stripes."""
        self._wanted_shape = wanted_shape(self._file)
        if self.fast is not None:
            self.fast.use_shape(self._wanted_shape)

    def find(self, key_hash: int, key: bytes) -> int:
        """Return the offset of the slot of `key`.

        A slot whose record is damaged where the end of its long key stood is taken for that of
        `key` if all else fits. Where it is absent: minus the offset of the free slot to put it in,
        or 0 where its segment has none.

        Raises:
            CorruptStoreError: a page on the way is no bucket, or of another segment or moment.
        """
        words, mapped = self._words, self._map
        position = key_hash >> DIRECTORY_SHIFT
        base = self._directory[position] << EXTENT_SHIFT
        bucket = home = base | (key_hash & BUCKET_COUNT - 1) << BUCKET_SHIFT
        size = len(key)
        fingerprint = FINGERPRINTS[key_hash >> FINGERPRINT_SHIFT & 0xFF]
        free = damaged = 0
        shape = words[bucket + SHAPE_OFFSET >> 3]
        wanted = self._wanted_shape | position << SHAPE_PREFIX_SHIFT
        if (shape ^ wanted) & SHAPE_MASKS[shape & 0xFF] or (
            words[bucket >> 3] != BUCKET_MARKER | bucket >> BUCKET_SHIFT
        ):
            raise wrong_bucket_error(self._file, bucket, key_hash)
        while True:
            control = mapped[bucket + CONTROL_OFFSET : bucket + _CONTROL_END]
            index = control.find(fingerprint)
            while index >= 0:
                slot = bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE
                if words[slot + SLOT_RECORD_OFFSET >> 3] >> SLOT_KEY_SIZE_SHIFT == size:
                    same = (
                        mapped[slot : slot + size] == key
                        if size <= SLOT_KEY_SIZE
                        else self._compare_long(slot, key_hash, key)
                    )
                    if same:
                        return slot
                    if same is None:
                        damaged = slot
                index = control.find(fingerprint, index + 1)
            index = control.find(EMPTY_BYTE)
            if index >= 0:
                return damaged or free or -(bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE)
            if not free:
                index = control.find(TOMBSTONE_BYTE)
                if index >= 0:
                    free = -(bucket + BUCKET_HEADER_SIZE + index * SLOT_SIZE)
            bucket = base | bucket + BUCKET_SIZE & EXTENT_SIZE - 1
            if bucket == home:
                return damaged or free
            if words[bucket + SHAPE_OFFSET >> 3] != shape or (
                words[bucket >> 3] != BUCKET_MARKER | bucket >> BUCKET_SHIFT
            ):
                raise torn_bucket_error(self._file, bucket, shape)

    def _compare_long(self, slot: int, hash_of_key: int, key: bytes) -> bool | None:
        """Compare a key longer than 32 bytes: its start in the slot, the rest in the record.

        Returns:
            Whether the slot is that key's; None where its record is too damaged to tell.
        """
        if self._map[slot : slot + SLOT_KEY_SIZE] != key[:SLOT_KEY_SIZE]:
            return False
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        found = self._records.key_at(tail & SLOT_RECORD_MASK, len(key))
        if found == key:
            return True
        if self._records.is_valid_record(tail):
            return False
        # A key that belongs here as well as `key` does is another one, whose value is damaged.
        differing = key_hash(found, self._file.hash_seed) ^ hash_of_key
        return None if differing & _PLACING_BITS else False

    def insert(
        self, slot: int, key_hash: int, key: bytes, record: int, value_size: int, expires_at: int
    ) -> None:
        """Make the free `slot` that `find` gave point at the whole record at offset `record`.

        Where it raises, the slot is either untouched or whole; `is_live` tells.
        """
        words, file = self._words, self._file
        file.write(slot, SLOT.pack(key, expires_at, record, value_size, len(key)))
        entry_offset = EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4)
        if expires_at:
            self._note_expiry(slot, expires_at)
        control_offset = control_offset_of(slot)
        control = self._map[control_offset]
        entry = words[entry_offset >> 3]
        one = ENTRY_LIVE_ONE if control else ENTRY_LIVE_ONE + ENTRY_USED_ONE
        try:
            file.write_word(entry_offset >> 3, entry + one)
            # Last: until now a reader ignores the slot. A crash just before this leaves a record
            # that no slot points to, and recovery adopts it.
            file.write(control_offset, FINGERPRINTS[key_hash >> FINGERPRINT_SHIFT & 0xFF])
        except BaseException:
            self._file.restore(control_offset, bytes([control]))
            self._file.restore(entry_offset, U64.pack(entry))
            raise

    def _note_expiry(self, slot: int, expires_at: int) -> None:
        """Have "earliest expiry" of a slot's bucket and segment be no later than this."""
        bucket = (slot & -BUCKET_SIZE) + EARLIEST_OFFSET
        segment = EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4) + SEGMENT_EARLIEST_OFFSET
        for earliest in (bucket >> 3, segment >> 3):
            if expires_at < self._words[earliest]:
                self._file.write_word(earliest, expires_at)

    def replace(self, slot: int, record_and_flags: int, value_size: int, expires_at: int) -> None:
        """Make a live slot point at another whole record of its key.

        Where it raises, the slot is either as it was or switched.
        """
        key_size = self._map[slot + SLOT_KEY_SIZE_OFFSET]
        tail = (
            record_and_flags | value_size << SLOT_VALUE_SIZE_SHIFT | key_size << SLOT_KEY_SIZE_SHIFT
        )
        if expires_at:
            self._note_expiry(slot, expires_at)
        self._file.write(slot + SLOT_EXPIRES_OFFSET, SLOT_ENDING.pack(expires_at, tail))

    def add_flags(self, slot: int, flags: int) -> None:
        """Set flags of a live slot; where the disk refuses, as `DataFile.restore` does."""
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        self._file.restore(slot + SLOT_RECORD_OFFSET, U64.pack(tail | flags))

    def delete(self, slot: int, key: bytes) -> int:
        """Take the live slot of `key` out of the table, then free its record, or mark it.

        A block that does not hold a record of that key, because slot or record is damaged, is left
        alone; the next opening sorts it out. Where it raises, the key is either there or gone.

        Returns:
            The offset of the record that was; 0 where it was left alone.
        """
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        record = tail & SLOT_RECORD_MASK
        if self.fast is not None and self.fast.delete_slot(slot, key):
            return record
        if not self._records.contains_record_of(tail, key):
            self._file.require_rebuild()
            self._versions.leaks = True
            self.remove(slot)
            return 0
        try:
            self.remove(slot)
            self.release(tail, key)
        except BaseException:
            self.put_back_unless_freed(slot, key)
            raise
        return record

    def release(self, tail: int, key: bytes) -> None:
        """Free the record of a slot that is out of the table, with `tail` as its last word.

        Or mark it, where older ones may be on the disk: see `versions`.
        """
        record = tail & SLOT_RECORD_MASK
        stripe = key_hash(key, self._file.hash_seed) >> STRIPE_SHIFT if tail & SLOT_FLAGS else 0
        if not self._versions.may_have_older(stripe, self._records.stamp_at(record), tail):
            self._slab.free(record)
            return
        is_damaged = not self._records.is_valid_record(tail)
        self._slab.retire(record, MARKED_MAGIC)
        if is_damaged:
            # Only what is whole outranks others; and only now, for nobody must read this value.
            self._records.seal(record, tail, key, self._versions.next_stamp(stripe, 0))

    def put_back_unless_freed(self, slot: int, key: bytes) -> None:
        """Put a slot back that was removed and whose record was neither freed nor marked.

        A record without a slot must not outlive this: the next rebuild would adopt it, although its
        key may have been created and deleted again meanwhile. And where it was freed, another
        thread may have created a record of another key in its block.
        """
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        if not self.is_live(slot) and self._records.contains_record_of(tail, key):
            self._put_back(slot, key)

    def remove(self, slot: int) -> None:
        """Take a live slot out of the table.

        Where it raises, the slot is either as it was or removed; `is_live` tells.
        """
        control_offset = control_offset_of(slot)
        bucket = slot & -BUCKET_SIZE
        controls = self._map[bucket + CONTROL_OFFSET : bucket + _CONTROL_END]
        entry_offset = EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4)
        entry = self._words[entry_offset >> 3]
        if controls.find(EMPTY_BYTE) >= 0:  # no probe has gone past this bucket
            control, after = EMPTY_BYTE, entry - (ENTRY_LIVE_ONE + ENTRY_USED_ONE)
        else:
            control, after = TOMBSTONE_BYTE, entry - ENTRY_LIVE_ONE
        if after < 0:
            # Damage: the counts say that there is no such slot. They are made anew at the next
            # opening, or when the segment is next rewritten.
            self._file.require_rebuild()
            after = entry
        try:
            self._file.write(control_offset, control)
            self._file.write_word(entry_offset >> 3, after)
        except BaseException:
            self._file.restore(entry_offset, U64.pack(entry))
            self._file.restore(
                control_offset, controls[control_offset - bucket - CONTROL_OFFSET :][:1]
            )
            raise

    def _put_back(self, slot: int, key: bytes) -> None:
        """Take back what `remove` did; where the disk refuses, as `DataFile.restore` does."""
        hash_of_key = key_hash(key, self._file.hash_seed)
        control_offset = control_offset_of(slot)
        entry_offset = EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4)
        entry = self._words[entry_offset >> 3]
        is_tombstone = self._map[control_offset]
        one = ENTRY_LIVE_ONE if is_tombstone else ENTRY_LIVE_ONE + ENTRY_USED_ONE
        self._file.restore(entry_offset, U64.pack(entry + one))
        self._file.restore(control_offset, FINGERPRINTS[hash_of_key >> FINGERPRINT_SHIFT & 0xFF])

    def mask_slot(self, slot: int) -> None:
        """Have readers not find a live slot that could not be removed.

        The file is as it was, and refuses changes from now on.
        """
        entry_offset = EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4)
        entry = self._words[entry_offset >> 3]
        self._file.restore(control_offset_of(slot), TOMBSTONE_BYTE)
        self._file.restore(entry_offset, U64.pack(entry - ENTRY_LIVE_ONE))

    def is_live(self, slot: int) -> bool:
        """Return whether the slot has a fingerprint."""
        return self._map[control_offset_of(slot)] > CONTROL_TOMBSTONE

    def is_expired(self, slot: int, now_ms: int) -> bool:
        """Return whether a live slot is past its expiry, and its record agrees on that."""
        expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
        return 0 < expires_at <= now_ms and expires_at == self._records.expiry_at(
            self._words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK
        )

    def used_slot_count(self, slot: int) -> int:
        """Return how many slots of this slot's segment are live or tombstones."""
        entry = self._words[EXTENT_MAP_OFFSET + (slot >> EXTENT_SHIFT << 4) >> 3]
        return entry >> ENTRY_USED_SHIFT & _COUNT_MASK

    def slot_key(self, slot: bytes) -> bytes:
        """Return the key of a live slot of these bytes; the end of a long one is in its record."""
        size = slot[SLOT_KEY_SIZE_OFFSET]
        if size > SLOT_KEY_SIZE:
            (tail,) = U64.unpack_from(slot, SLOT_RECORD_OFFSET)
            return self._records.key_at(tail & SLOT_RECORD_MASK, size)
        return slot[:size]

    def slot_record(self, slot: bytes) -> int:
        """Return the offset of the record of a slot of these bytes; 0 where there is none."""
        (tail,) = U64.unpack_from(slot, SLOT_RECORD_OFFSET)
        if self._records.contains_record_of(tail, self.slot_key(slot)):
            return int(tail & SLOT_RECORD_MASK)
        return 0


def control_offset_of(slot: int) -> int:
    """Return the file offset of the control byte of the slot at file offset `slot`."""
    index = ((slot & BUCKET_SIZE - 1) - BUCKET_HEADER_SIZE) // SLOT_SIZE
    return (slot & -BUCKET_SIZE) + CONTROL_OFFSET + index
