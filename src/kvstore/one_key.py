"""The operations on one key: all of what they do under locks, be it common or not.

Each takes the key's stripe and asks under it whether the store is closed. The thread is inside from
before that until after it: see `reentry`. That is spelled out in each, for `locks.operation` would
cost several calls more.
"""

from typing import TYPE_CHECKING, Literal

from xxhash import xxh3_64_intdigest

from . import clock
from .changes import Changes, NewRecord, Version, damaged_error
from .errors import KeyNotFoundError
from .file.datafile import DataFile
from .file.reentry import leave, thread, waiting
from .format.layout import (
    RECORD_HEADER_SIZE,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    STAMP_SHIFT,
    STRIPE_SHIFT,
)
from .index.records import Records, verify
from .index.slots import Slots
from .locks import StoreLocks, operation

if TYPE_CHECKING:
    from .compiled.interface import FastPath


class OneKey:
    """The operations on one key of a store, without their checks of arguments and their flushes.

    A `key` is for messages; `encoded_key` is what counts.
    """

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        slots: Slots,
        records: Records,
        changes: Changes,
        fast: "FastPath | None",
        *,
        durable: bool,
    ) -> None:
        self._locks = locks
        self._file = file
        self._words = file.words
        self._seed = file.hash_seed
        self._slots = slots
        self._records = records
        self._changes = changes
        self._fast = fast
        self._durable = durable
        self._is_begun = False

    def store(
        self,
        key: str,
        encoded_key: bytes,
        encoded: bytes,
        lifetime: int,
        *,
        replace: bool,
        times: tuple[int, int] | None = None,
        only: Version | None = None,
    ) -> int:
        """Store a value under a key and return the offset of its record.

        It expires after `lifetime` milliseconds, 0: never; with `times`, these are its created_at
        and its expires_at instead. With `only`, nothing is done, and 0 returned, where the key has
        another record than that by now.

        Raises:
            KeyExistsError, StoreFullError, CorruptStoreError: as `Changes.store`.
            KeyNotFoundError: with `only`, it is absent, or has expired.
        """
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        if not self._is_begun:
            self.begin()
        locks, inside = self._locks, thread.inside
        if inside._is_owned():
            locks.check_reentry(self._durable)
        try:
            with inside, locks.stripes[key_hash >> STRIPE_SHIFT]:
                if locks.closed:
                    locks.raise_closed()
                if only is not None and not self._changes.is_same(
                    self._changes.find_live(key, key_hash, encoded_key)[0], only
                ):
                    return 0
                now_ms = clock.now_ms()
                created_at, expires_at = times or (None, now_ms + lifetime if lifetime else 0)
                new = NewRecord(key, key_hash, encoded_key, encoded, now_ms, expires_at, created_at)
                return self._changes.store(new, replace=replace)
        finally:
            if waiting:
                leave()

    def begin(self) -> None:
        """Begin changes, once; a file that was begun stays so."""
        if self._locks.closed:
            self._locks.raise_closed()
        if self._file.pristine:
            self._mark_dirty()
        self._is_begun = True
        if self._fast is not None:
            self._fast.begin()

    @operation(flushes=True)
    def _mark_dirty(self) -> None:
        self._locks.mark_dirty()

    def read(self, key: str, encoded_key: bytes) -> tuple[bytes, Version]:
        """Return the value of a key as JSON, and which of its records has it.

        Raises:
            KeyNotFoundError: it is absent, or has expired.
            CorruptStoreError: its bytes in the file are damaged.
        """
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        locks, inside = self._locks, thread.inside
        if inside._is_owned():
            locks.check_reentry(False)
        try:
            with inside, locks.stripes[key_hash >> STRIPE_SHIFT]:
                if locks.closed:
                    locks.raise_closed()
                slot, expires_at = self._changes.find_live(key, key_hash, encoded_key)
                tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
                header, encoded = self._records.read_record(tail)
        finally:
            if waiting:
                leave()
        if not verify(header, encoded, tail, expires_at, key_hash):
            raise damaged_error(key, slot, tail & SLOT_RECORD_MASK)
        return encoded, (tail, header[1])

    def read_bytes(self, key: str, encoded_key: bytes) -> bytes:
        """As `read`, the value alone."""
        return self.read(key, encoded_key)[0]

    def touch(self, key: str, encoded_key: bytes, lifetime: int) -> tuple[int, int]:
        """Store the value of a key anew, with another expiry; return offset and size of the record.

        Raises as `read` and `store`.
        """
        while True:
            # No lock is held while the value is verified; so it is done again if it was replaced.
            encoded, version = self.read(key, encoded_key)
            record = self.store(key, encoded_key, encoded, lifetime, replace=True, only=version)
            if record:
                return record, RECORD_HEADER_SIZE + len(encoded_key) + len(encoded)

    def read_record(self, key: str, encoded_key: bytes, now_ms: int) -> tuple[bytes, int, int]:
        """Return a key's value as JSON, its created_at and its expires_at, all of one record.

        `now_ms` is what counts as the time; at 0 nothing has expired.

        Raises:
            KeyNotFoundError: it is absent, or has expired.
            CorruptStoreError: its bytes in the file are damaged.
        """
        found = None if self._fast is None else self._fast.read_record(encoded_key, now_ms)
        if found is None:
            found = self._read_record(key, encoded_key, now_ms)
        if found is False:
            raise KeyNotFoundError(key)
        encoded, stamp, expires_at = found
        return encoded, stamp >> STAMP_SHIFT, expires_at

    def _read_record(
        self, key: str, encoded_key: bytes, now_ms: int
    ) -> tuple[bytes, int, int] | Literal[False]:
        """As `FastPath.read_record`, whatever it takes."""
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        copied = self._copy_record(key_hash, encoded_key, now_ms)
        if copied is None:
            return False
        slot, tail, expires_at, header, encoded = copied
        if not verify(header, encoded, tail, expires_at, key_hash):
            raise damaged_error(key, slot, tail & SLOT_RECORD_MASK)
        return encoded, header[1], expires_at

    @operation(flushes=False)
    def _copy_record(
        self, key_hash: int, encoded_key: bytes, now_ms: int
    ) -> tuple[int, int, int, tuple[int, int, int, int], bytes] | None:
        """Copy what a live slot of a key has, and its record as `Records.read_record` does."""
        with self._locks.stripes[key_hash >> STRIPE_SHIFT]:
            if self._locks.closed:
                self._locks.raise_closed()
            slot = self._slots.find(key_hash, encoded_key)
            if slot <= 0:
                return None
            expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
            if 0 < expires_at <= now_ms and self._slots.is_expired(slot, now_ms):
                return None
            tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
            return slot, tail, expires_at, *self._records.read_record(tail)

    def expiry(self, encoded_key: bytes, key: str | None = None) -> bool | tuple[int, int]:
        """Return whether a key is there; if it has an expires_at, that and the time now, in ms.

        Raises CorruptStoreError where its record says otherwise, if it has a `key` to name.
        """
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        locks, inside = self._locks, thread.inside
        if inside._is_owned():
            locks.check_reentry(False)
        try:
            with inside, locks.stripes[key_hash >> STRIPE_SHIFT]:
                if locks.closed:
                    locks.raise_closed()
                slot = self._slots.find(key_hash, encoded_key)
                if slot <= 0:
                    return False
                expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
                now_ms = clock.now_ms() if expires_at else 0
                if expires_at and self._slots.is_expired(slot, now_ms):
                    return False
                if key is not None:
                    record = self._words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK
                    if self._records.expiry_at(record) != expires_at:
                        raise damaged_error(key, slot, record)
                return (expires_at, now_ms) if expires_at else True
        finally:
            if waiting:
                leave()

    def delete(self, key: str, encoded_key: bytes, only: Version | None = None) -> tuple[int, int]:
        """Delete a key; return the offset of what says so in the file, and with `durable` its size.

        The offset is 0 where the record is damaged. With `only`, nothing is done, and it is -1,
        where the key has another record by now.

        Raises:
            KeyNotFoundError: it is absent, or has expired.
        """
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        if not self._is_begun:
            self.begin()
        locks, inside = self._locks, thread.inside
        if inside._is_owned():
            locks.check_reentry(self._durable)
        try:
            with inside, locks.stripes[key_hash >> STRIPE_SHIFT]:
                if locks.closed:
                    locks.raise_closed()
                if only is not None and not self._changes.is_same(
                    self._changes.find_live(key, key_hash, encoded_key)[0], only
                ):
                    return -1, 0
                record = self._changes.delete(key, key_hash, encoded_key, owes_flush=self._durable)
                return record, self._records.end_size(record) if self._durable else 0
        finally:
            if waiting:
                leave()
