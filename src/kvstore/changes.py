"""The steps of storing and of deleting, in the order that a crash allows, and how they are undone.

Each is done under the key's stripe, which the caller holds; `locks` has the order of all locks.
Where one raises, the key is either as it was or as it was to be: what was stored by then is taken
back, or kept where that is the whole of it.

A record that takes another's place is written whole, then the slot is switched, then the old one is
done with: freed where nobody was promised it, else retired. What that rests on: see `versions`.

A file that is not written through the map costs a call of the system for each store. There the
steps are the same, but the fast path tells what they are, where the store has one.
"""

from typing import TYPE_CHECKING, Final

from . import clock
from .errors import (
    CorruptStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreFullError,
)
from .file.datafile import DataFile
from .format.layout import (
    EXTENT_SHIFT,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_ENDING,
    SLOT_EXPIRES_OFFSET,
    SLOT_FLAGS,
    SLOT_OLDER,
    SLOT_OLDER_UNDATED,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SPLIT_AT,
    STAMP_LIMIT,
    STAMP_SHIFT,
    STRIPE_SHIFT,
)
from .index.records import Records, verify
from .index.segments import Segments
from .index.slab import NoOtherBlockError, Slab
from .index.slots import Slots
from .index.versions import Versions

if TYPE_CHECKING:
    from .compiled.interface import Change, FastPath, Plan

# Beyond 7/8, where no extent could be had: how many inserts until that is tried again.
_RETRY_EVERY: Final = 16


class NewRecord:
    """What is to be stored under a key.

    `key` is for messages, `encoded_key` is what counts; `encoded` is the value as JSON;
    `created_at`, in ms, the time of creation where that is not `now_ms`.
    """

    __slots__ = (
        "created_at",
        "encoded",
        "encoded_key",
        "expires_at",
        "key",
        "key_hash",
        "now_ms",
    )

    def __init__(
        self,
        key: str,
        key_hash: int,
        encoded_key: bytes,
        encoded: bytes,
        now_ms: int,
        expires_at: int,
        created_at: int | None = None,
    ) -> None:
        self.key = key
        self.key_hash = key_hash
        self.encoded_key = encoded_key
        self.encoded = encoded
        self.now_ms = now_ms
        self.expires_at = expires_at
        self.created_at = created_at

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return RECORD_HEADER_SIZE + len(self.encoded_key) + len(self.encoded)

    @property
    def stripe(self) -> int:
        """The number of the key's stripe."""
        return self.key_hash >> STRIPE_SHIFT


class Superseded:
    """What a slot has whose record is being superseded.

    `tail` is the slot's last word. `is_known`: the record is there; else slot or record is damaged,
    and nobody knows what is left of it.
    """

    __slots__ = ("expires_at", "is_known", "stamp", "tail")

    def __init__(self, expires_at: int, tail: int, stamp: int, is_known: bool) -> None:
        self.expires_at = expires_at
        self.tail = tail
        self.stamp = stamp
        self.is_known = is_known


Version = tuple[int, int]
"""A slot's last word, and the stamp of its record: no other record of the key has the same."""


class Changes:
    """Stores and deletes records of `file`, their slots and their blocks together."""

    def __init__(
        self,
        file: DataFile,
        slab: Slab,
        records: Records,
        slots: Slots,
        segments: Segments,
        versions: Versions,
        fast: "FastPath | None",
    ) -> None:
        self._file = file
        self._words = file.words
        self._slab = slab
        self._records = records
        self._slots = slots
        self._segments = segments
        self._versions = versions
        self._fast = fast

    def store(self, new: NewRecord, *, replace: bool) -> int:
        """Store a record and return its offset. One that has expired is replaced in any case.

        Raises:
            KeyExistsError: the key is there and has not expired, and is not to be replaced.
            StoreFullError: no block, or no slot, can be had.
            CorruptStoreError: what it meets is damaged.
        """
        try:
            if self._fast is not None:
                store = self._store_fast if self._file.in_place else self._store_planned
                record = store(self._fast, new, replace)
                if record:
                    return record
            slot = self._find_place(new, replace)
            return self._supersede(slot, new) if slot > 0 else self._insert(-slot, new)
        except KVStoreError:
            raise
        except BaseException:
            self._file.require_rebuild()
            raise

    def _find_place(self, new: NewRecord, replace: bool) -> int:
        """Return the slot of a key whose record is to be replaced, or minus a free one for it."""
        slots = self._slots
        slot = slots.find(new.key_hash, new.encoded_key)
        if slot <= 0:
            used = slots.used_slot_count(-slot) if slot else SEGMENT_SLOTS
            if used >= SPLIT_AT and (not slot or used % _RETRY_EVERY == 0):
                self._segments.split_or_compact(new.key_hash, new.now_ms)
                # It may be there now: damage had led its slot astray, and the rewriting has put it
                # where it is found.
                slot = slots.find(new.key_hash, new.encoded_key)
        if not slot:
            raise StoreFullError(
                f"{self._file.path}: the table's segment for this key has all of its "
                f"{SEGMENT_SLOTS:,} slots in use and no extent is left to split it; delete "
                f"something first"
            )
        if slot > 0 and not (replace or slots.is_expired(slot, new.now_ms)):
            raise exists_error(new.key)
        return slot

    def _insert(self, slot: int, new: NewRecord) -> int:
        """Store a record whose key is absent, with the free `slot` for it."""
        taken: list[int] = []
        try:
            record = self._slab.allocate(new.size, taken)
            self._write(record, new, supersedes=None)
            self._slots.insert(
                slot, new.key_hash, new.encoded_key, record, len(new.encoded), new.expires_at
            )
            if not self._file.in_place:
                self._records.finish_record(record)
        except BaseException:
            self._give_up(slot, taken)
            raise
        return record

    def _write(self, record: int, new: NewRecord, supersedes: int | None) -> None:
        """Write a record to its block, which supersedes the one with this stamp."""
        if new.created_at is None:
            stamp = self._versions.next_stamp(new.stripe, new.now_ms)
        else:
            stamp = self._versions.stamp_of(new.stripe, new.created_at, supersedes)
        self._records.write_record(
            record, new.encoded_key, new.encoded, new.key_hash, stamp, new.expires_at
        )

    def _supersede(self, slot: int, new: NewRecord) -> int:
        """Store a record in the place of the one that the live `slot` of its key has."""
        old = self._in_slot(slot, new.encoded_key, new.stripe)
        taken: list[int] = []
        try:
            record = self._slab.allocate(new.size, taken)
            self._write(record, new, supersedes=old.stamp)
            undated = 0 if new.created_at is None else SLOT_OLDER_UNDATED
            self._switch(slot, old, new.stripe, record | undated, len(new.encoded), new.expires_at)
        except BaseException:
            self._undo_supersede(slot, old, taken)
            raise
        return record

    def move(self, record: int, key_hash: int, encoded_key: bytes) -> bool:
        """Move the whole record of a key to another extent of its class, if it is the current one.

        It is superseded by a copy with its stamp: of the two, recovery takes either. The caller
        holds the key's stripe, and sees to it that nobody is reclaiming.

        Returns:
            False where no slot leads to it, or it is damaged: it stays.

        Raises:
            NoOtherBlockError: no other extent of its class has room.
            CorruptStoreError, StoreFullError: as `store`.
        """
        slot = self._slots.find(key_hash, encoded_key)
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3] if slot > 0 else 0
        if tail & SLOT_RECORD_MASK != record:
            return False
        old = self._in_slot(slot, encoded_key, key_hash >> STRIPE_SHIFT)
        header, value = self._records.read_record(tail)
        if not (old.is_known and verify(header, value, tail, old.expires_at, key_hash)):
            return False
        try:
            self._move(slot, old, key_hash, encoded_key, value)
        except (KVStoreError, NoOtherBlockError):
            raise
        except BaseException:
            self._file.require_rebuild()
            raise
        return True

    def _move(
        self, slot: int, old: Superseded, key_hash: int, encoded_key: bytes, value: bytes
    ) -> None:
        stripe = key_hash >> STRIPE_SHIFT
        extent = (old.tail & SLOT_RECORD_MASK) >> EXTENT_SHIFT
        taken: list[int] = []
        try:
            size = RECORD_HEADER_SIZE + len(encoded_key) + len(value)
            copy = self._slab.allocate(size, taken, moved_from=extent)
            self._records.write_record(
                copy, encoded_key, value, key_hash, old.stamp, old.expires_at
            )
            self._switch(slot, old, stripe, copy, len(value), old.expires_at, is_copy=True)
        except BaseException:
            self._undo_supersede(slot, old, taken)
            raise

    def _switch(
        self,
        slot: int,
        old: Superseded,
        stripe: int,
        record_and_flags: int,
        value_size: int,
        expires_at: int,
        *,
        is_copy: bool = False,
    ) -> None:
        """Have a slot lead to a record that was written, which counts from then on."""
        file = self._file
        with self._slab.lock:
            is_fresh = self._is_fresh(old, stripe)
            record_and_flags |= old.tail & SLOT_FLAGS
            if not (is_fresh and file.in_place):  # elsewhere the freeing may be refused
                record_and_flags |= SLOT_OLDER
                if is_copy:
                    self._versions.doubt(stripe, old.stamp)
            self._slots.replace(slot, record_and_flags, value_size, expires_at)
            if not file.in_place:
                self._records.finish_record(record_and_flags & SLOT_RECORD_MASK)
            self._done_with(slot, old, is_fresh)

    def _in_slot(self, slot: int, encoded_key: bytes, stripe: int) -> Superseded:
        """Return what a live slot has at the moment."""
        expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        stamp = self._records.stamp_at(tail & SLOT_RECORD_MASK)
        is_known = stamp <= self._versions.last_stamp(stripe) and self._records.contains_record_of(
            tail, encoded_key
        )
        return Superseded(expires_at, tail, stamp if is_known else 0, is_known)

    def _is_fresh(self, old: Superseded, stripe: int) -> bool:
        return old.is_known and self._versions.is_fresh(stripe, old.stamp, old.tail)

    def _done_with(self, slot: int, old: Superseded, is_fresh: bool) -> None:
        """Free or retire the record that a slot had before. The caller holds the space lock."""
        try:
            if old.is_known:
                self._slab.free_or_retire(old.tail & SLOT_RECORD_MASK, is_fresh=is_fresh)
            else:
                self._leak(slot)
        except (KVStoreError, OSError):
            self._leak(slot)

    def _leak(self, slot: int) -> None:
        """Go on although the record that a slot had before is left, until the next opening."""
        self._versions.leaks = True
        self._file.require_rebuild()
        self._slots.add_flags(slot, SLOT_OLDER_UNDATED)

    def _undo_supersede(self, slot: int, old: Superseded, taken: list[int]) -> None:
        """Undo what was cut short, unless the new record is in the slot, and whole."""
        for record in taken:
            found = self._words[slot + SLOT_RECORD_OFFSET >> 3]
            if found & SLOT_RECORD_MASK == record and self._records.is_record(record):
                self._leak(slot)  # unless the old one was dealt with, which nobody knows
            else:
                ending = SLOT_ENDING.pack(old.expires_at, old.tail)
                self._file.restore(slot + SLOT_EXPIRES_OFFSET, ending)
                self._slab.discard(record)

    def _give_up(self, slot: int, taken: list[int]) -> None:
        """Undo a `create` that was cut short, unless its record is in its slot already."""
        for record in taken:
            if not (self._slots.is_live(slot) and self._records.is_record(record)):
                self._undo_create(slot, record)

    def _undo_create(self, slot: int, record: int) -> None:
        """Give back the block of a record, and the slot if it got as far as that."""
        if self._slots.is_live(slot):
            try:
                self._slots.remove(slot)
            except (KVStoreError, OSError) as error:
                # Where the map is not private, the key seems damaged until the next opening, which
                # finds no record of it.
                self._file.make_read_only(error)
                self._slots.mask_slot(slot)
                return
        self._slab.discard(record)

    def find_live(self, key: str, key_hash: int, encoded_key: bytes) -> tuple[int, int]:
        """Return a key's slot and its expires_at. The caller holds its stripe.

        Raises:
            KeyNotFoundError: it is absent, or has expired.
        """
        slot = self._slots.find(key_hash, encoded_key)
        if slot <= 0:
            raise KeyNotFoundError(key)
        expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
        if (
            expires_at
            and expires_at <= clock.time_ns() // 1_000_000
            and self._slots.is_expired(slot, clock.now_ms())
        ):
            raise KeyNotFoundError(key, "has expired")
        return slot, expires_at

    def is_same(self, slot: int, version: Version) -> bool:
        """Return whether a live slot still has that record."""
        tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
        return version == (tail, self._records.stamp_at(tail & SLOT_RECORD_MASK))

    def delete(self, key: str, key_hash: int, encoded_key: bytes, *, owes_flush: bool) -> int:
        """Delete a key; return the offset of its record, 0 where that is damaged.

        With `owes_flush`, a later flush of one record has to cover this.

        Raises:
            KeyNotFoundError: it is absent, or has expired.
        """
        try:
            record = 0
            if self._fast is not None:
                delete = self._delete_fast if self._file.in_place else self._delete_planned
                record = delete(self._fast, encoded_key)
            if not record:
                slot, _ = self.find_live(key, key_hash, encoded_key)
                record = self._slots.delete(slot, encoded_key)
            if owes_flush:
                self._file.record_cleared(record)
        except KVStoreError:
            raise
        except BaseException:
            self._file.require_rebuild()
            raise
        return record

    # --- with the fast path --------------------------------------------------------------------

    # Each returns the offset of the record; 0 where nothing was done: it would raise, or is out of
    # the ordinary.

    def _store_fast(self, fast: "FastPath", new: NewRecord, replace: bool) -> int:
        done = self._ask(fast, new, replace)
        if done == 0:
            self._slab.open_extent_for(new.size)
            done = self._ask(fast, new, replace)
        return done & SLOT_RECORD_MASK if type(done) is int else 0

    def _ask(self, fast: "FastPath", new: NewRecord, replace: bool) -> "int | Plan | None":
        stamp = 0  # the next one
        if new.created_at is not None:
            # Fits an absent key that nothing outranks; all else is done in Python.
            stamp = new.created_at << STAMP_SHIFT
            if not 0 < stamp < STAMP_LIMIT or self._versions.marks or self._versions.leaks:
                return None
            replace = False
        return fast.create_under_locks(
            new.encoded_key, new.encoded, stamp, new.expires_at, new.now_ms, replace
        )

    def _delete_fast(self, fast: "FastPath", encoded_key: bytes) -> int:
        now_ms = clock.now_ms()
        done = fast.delete_under_locks(encoded_key, now_ms)
        if done == 0:
            self._slab.free_spare()
            done = fast.delete_under_locks(encoded_key, now_ms)
        return done if type(done) is int else 0

    def _store_planned(self, fast: "FastPath", new: NewRecord, replace: bool) -> int:
        slot = record = 0
        changes: list[Change] = []
        taken: list[int] = []
        old: Superseded | None = None
        try:
            with self._slab.lock:
                planned = self._ask(fast, new, replace)
                if not isinstance(planned, tuple):
                    return 0
                slot, record, changes = planned
                if self._slots.is_live(slot):
                    old = self._in_slot(slot, new.encoded_key, new.stripe)
                try:
                    self._file.write_all(changes)
                except BaseException:
                    # Asked here: once the lock is let go of, another may take that block.
                    if self._are_written(changes[:1]):
                        taken.append(record)
                    raise
                if old is not None:
                    taken.append(record)
                    self._done_with(slot, old, self._is_fresh(old, new.stripe))
        except BaseException:
            if old is not None:
                self._undo_supersede(slot, old, taken)
            else:
                self._restore_unless_whole(changes[-3:-1])
                self._give_up(slot, taken)
            raise
        return record

    def _delete_planned(self, fast: "FastPath", encoded_key: bytes) -> int:
        slot = record = 0
        changes: list[Change] = []
        now_ms = clock.now_ms()
        try:
            with self._slab.lock:
                planned = fast.delete_under_locks(encoded_key, now_ms)
                if not isinstance(planned, tuple):
                    return 0
                slot, record, changes = planned
                try:
                    self._file.write_all(changes)
                except BaseException:
                    # Here: once the lock is let go of, the entry is for others to change.
                    self._restore_unless_whole(changes[2:])
                    raise
        except BaseException:
            self._restore_unless_whole(changes[:2])
            if slot:
                self._slots.put_back_unless_freed(slot, encoded_key)
            raise
        return record

    def _are_written(self, changes: "list[Change]") -> bool:
        """Return whether all of these, at least one, are in the file."""
        mapped = self._file.map
        return bool(changes) and all(
            mapped[offset : offset + len(data)] == data for offset, data, _ in changes
        )

    def _restore_unless_whole(self, changes: "list[Change]") -> None:
        """Take back changes that belong together, if not all of them were made."""
        if not self._are_written(changes):
            for offset, _, old in reversed(changes):
                self._file.restore(offset, old)


def exists_error(key: str) -> KeyExistsError:
    """Return the error for a key that is there already."""
    return KeyExistsError(f"key {key!r}: exists already; put it to replace the value")


def damaged_error(key: str, slot: int, record: int) -> CorruptStoreError:
    """Return the error for a key whose record, or slot, is damaged."""
    return CorruptStoreError(
        f"key {key!r}: the record at byte {record:,} fails its checksum, or is not the one that "
        f"its slot at byte {slot:,} tells of; put the key again, or delete it"
    )
