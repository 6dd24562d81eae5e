"""The steps of a create and of a delete, in the order that a crash allows, and how they are undone.

Each is done under the key's stripe, which the caller holds; `locks` has the order of all locks.
Where one raises, the key is either as it was or as it was to be: what was stored by then is taken
back, or kept where that is the whole of it.

A file that is not written through the map costs a call of the system for each store. There the
steps are the same, but the fast path tells what they are, where the store has one.
"""

from typing import Final

from . import clock
from .compiled import Change, FastPath
from .errors import (
    CorruptStoreError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreFullError,
)
from .file.datafile import DataFile
from .format.layout import (
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_MASK,
    SPLIT_AT,
)
from .index.records import Records
from .index.segments import Segments
from .index.slab import Slab
from .index.slots import Slots

# Beyond 7/8, where no extent could be had: how many inserts until that is tried again.
_RETRY_EVERY: Final = 16


class Changes:
    """Creates and deletes records of `file`, their slots and their blocks together."""

    def __init__(
        self,
        file: DataFile,
        slab: Slab,
        records: Records,
        slots: Slots,
        segments: Segments,
        fast: FastPath | None,
    ) -> None:
        self._file = file
        self._words = file.words
        self._slab = slab
        self._records = records
        self._slots = slots
        self._segments = segments
        self._fast = fast

    def create(
        self,
        key: str,
        key_hash: int,
        encoded_key: bytes,
        encoded: bytes,
        now_ms: int,
        created_at: int,
        expires_at: int,
    ) -> int:
        """Create a key and return the offset of its record.

        Raises:
            KeyExistsError: it is there and has not expired.
            StoreFullError: no block, or no slot, can be had.
            CorruptStoreError: what it meets is damaged.
        """
        try:
            if self._fast is not None:
                create = self._create_fast if self._file.in_place else self._create_planned
                record = create(self._fast, encoded_key, encoded, created_at, expires_at, now_ms)
                if record:
                    return record
            slot = self._find_free(key, key_hash, encoded_key, now_ms)
            taken: list[int] = []
            try:
                record = self._slab.allocate(
                    RECORD_HEADER_SIZE + len(encoded_key) + len(encoded), taken
                )
                self._records.write_record(
                    record, encoded_key, encoded, key_hash, created_at, expires_at
                )
                self._slots.insert(slot, key_hash, encoded_key, record, len(encoded), expires_at)
                if not self._file.in_place:
                    self._records.finish_record(record)
            except BaseException:
                self._give_up(slot, taken)
                raise
        except KVStoreError:
            raise
        except BaseException:
            self._file.require_rebuild()
            raise
        return record

    def _find_free(self, key: str, key_hash: int, encoded_key: bytes, now_ms: int) -> int:
        """Return a free slot for a key, once what has expired under it is deleted."""
        slots = self._slots
        slot = slots.find(key_hash, encoded_key)
        while slot > 0:  # more than once where damage gave a key two slots
            if not slots.is_expired(slot, now_ms):
                raise exists_error(key)
            slots.delete(slot, encoded_key)
            self._file.require_full_flush()
            slot = slots.find(key_hash, encoded_key)
        used = slots.used_slot_count(-slot) if slot else SEGMENT_SLOTS
        if used >= SPLIT_AT and (not slot or used % _RETRY_EVERY == 0):
            self._segments.split_or_compact(key_hash, now_ms)
            slot = slots.find(key_hash, encoded_key)
            if slot > 0:
                # Damage had led its slot astray; the rewriting has put it where it is found.
                raise exists_error(key)
            if not slot:
                raise StoreFullError(
                    f"{self._file.path}: the table's segment for this key has all of its "
                    f"{SEGMENT_SLOTS:,} slots in use and no extent is left to split it; delete "
                    f"something first"
                )
        return -slot

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

    def _create_fast(
        self,
        fast: FastPath,
        encoded_key: bytes,
        encoded: bytes,
        created_at: int,
        expires_at: int,
        now_ms: int,
    ) -> int:
        done = fast.create_under_locks(encoded_key, encoded, created_at, expires_at, now_ms)
        if done == 0:
            self._slab.open_extent_for(RECORD_HEADER_SIZE + len(encoded_key) + len(encoded))
            done = fast.create_under_locks(encoded_key, encoded, created_at, expires_at, now_ms)
        return done & SLOT_RECORD_MASK if type(done) is int else 0

    def _delete_fast(self, fast: FastPath, encoded_key: bytes) -> int:
        now_ms = clock.now_ms()
        done = fast.delete_under_locks(encoded_key, now_ms)
        if done == 0:
            self._slab.free_spare()
            done = fast.delete_under_locks(encoded_key, now_ms)
        return done if type(done) is int else 0

    def _create_planned(
        self,
        fast: FastPath,
        encoded_key: bytes,
        encoded: bytes,
        created_at: int,
        expires_at: int,
        now_ms: int,
    ) -> int:
        slot = record = 0
        changes: list[Change] = []
        taken: list[int] = []
        try:
            with self._slab.lock:
                planned = fast.create_under_locks(
                    encoded_key, encoded, created_at, expires_at, now_ms
                )
                if not isinstance(planned, tuple):
                    return 0
                slot, record, changes = planned
                try:
                    self._file.write_all(changes)
                except BaseException:
                    # Asked here: once the lock is let go of, another may take that block.
                    if self._are_written(changes[:1]):
                        taken.append(record)
                    raise
        except BaseException:
            self._restore_unless_whole(changes[-3:-1])
            self._give_up(slot, taken)
            raise
        return record

    def _delete_planned(self, fast: FastPath, encoded_key: bytes) -> int:
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

    def _are_written(self, changes: list[Change]) -> bool:
        """Return whether all of these, at least one, are in the file."""
        mapped = self._file.map
        return bool(changes) and all(
            mapped[offset : offset + len(data)] == data for offset, data, _ in changes
        )

    def _restore_unless_whole(self, changes: list[Change]) -> None:
        """Take back changes that belong together, if not all of them were made."""
        if not self._are_written(changes):
            for offset, _, old in reversed(changes):
                self._file.restore(offset, old)


def exists_error(key: str) -> KeyExistsError:
    """Return the error for a key that is there already."""
    return KeyExistsError(f"key {key!r}: exists already; delete it first")


def damaged_error(key: str, slot: int, record: int) -> CorruptStoreError:
    """Return the error for a key whose record, or slot, is damaged."""
    return CorruptStoreError(
        f"key {key!r}: the record at byte {record:,} fails its checksum, or is not the one that "
        f"its slot at byte {slot:,} tells of; delete the key"
    )
