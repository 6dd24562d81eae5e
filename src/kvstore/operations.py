"""The operations on one key: create, read and delete, and what else looks at a single slot.

Each takes the stripe of its key, and holds no lock while a value is encoded, verified or parsed,
nor while the disk flushes. `store` has the order of all locks.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar, overload

from xxhash import xxh3_64_intdigest

from . import clock
from .compiled import Lock, OwnedLock, compiled
from .errors import (
    CorruptStoreError,
    InvalidKeyError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreFullError,
)
from .file.datafile import DataFile
from .file.reentry import leave, thread, waiting
from .format.codec import Value, check_ttl, decode_value, encode_key, encode_value
from .format.layout import (
    FREE_BLOCK,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SPLIT_AT,
    STRIPE_COUNT,
    STRIPE_SHIFT,
)
from .index.records import Records, verify
from .index.segments import Segments
from .index.slab import Slab
from .index.slots import Slots

Default = TypeVar("Default")

# Beyond 7/8, where no extent could be had: how many inserts until that is tried again.
_RETRY_EVERY: Final = 16


class Operations(ABC):
    """The members of `KVStore` that are about one key. It opens and closes what they work on."""

    # Those that have a value here are asked for before a store is opened, and where it never is.
    _path: Path
    _file: DataFile
    _slab: Slab
    _records: Records
    _slots: Slots
    _segments: Segments
    _words: "memoryview[int]"
    _seed: int = 0
    _stripes: tuple[OwnedLock, ...] = tuple(Lock() for _ in range(STRIPE_COUNT))
    _durable: bool = False
    _closed: bool = True
    _inside: set[int] = set()  # noqa: RUF012 - of no store: each that is opened has its own
    _was_initialized: bool = False
    _was_open: bool = False
    _is_begun: bool = False

    @abstractmethod
    def _check_reentry(self, flushes: bool) -> None:
        """Raise StoreBusyError unless an operation may begin amid the one of this very thread."""

    @abstractmethod
    def _mark_dirty(self) -> None:
        """Have the disk know that the index is in flux, before the first change."""

    @abstractmethod
    def _raise_closed(self) -> NoReturn:
        """Raise StoreClosedError."""

    @abstractmethod
    def _purge_for_room(self) -> None:
        """Take back the space of what has expired, as far as that can be done."""

    def create(self, key: str, value: Value, ttl: int | None = None) -> None:
        """Store `value` under `key`, for `ttl` whole seconds or for good.

        Raises:
            InvalidKeyError, InvalidTTLError: `key` or `ttl` is not what the store takes.
            InvalidValueError: `value` would not read back equal.
            ValueTooLargeError: it takes more than 16,384 bytes of JSON.
            KeyExistsError: `key` is there and has not expired.
            StoreFullError: no room, after what had expired was taken back.
            StoreClosedError: the store is closed.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        encoded_key = encode_key(key)
        lifetime = 0 if ttl is None else check_ttl(key, ttl)
        encoded = encode_value(key, value)
        try:
            record = self._create(key, encoded_key, encoded, lifetime)
        except StoreFullError:
            if self._file.read_only:
                raise
            # Tried again even if another thread was the one to take something back.
            self._purge_for_room()
            record = self._create(key, encoded_key, encoded, lifetime)
        if self._durable:
            size = RECORD_HEADER_SIZE + len(encoded_key) + len(encoded)
            self._file.flush_record(record, size)

    def _create(
        self,
        key: str,
        encoded_key: bytes,
        encoded: bytes,
        lifetime: int,
        times: tuple[int, int] | None = None,
    ) -> int:
        """Do all of a `create` but the flush; return the offset of the record."""
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        if not self._is_begun:
            self._begin()
        inside = thread.inside
        if inside._is_owned():
            self._check_reentry(self._durable)
        try:
            with inside, self._stripes[key_hash >> STRIPE_SHIFT]:
                if self._closed:
                    self._raise_closed()
                return self._create_under_stripe(
                    key, key_hash, encoded_key, encoded, lifetime, times
                )
        finally:
            if waiting:
                leave()

    def _begin(self) -> None:
        """Begin changes, once; a file that was begun stays so."""
        if self._closed:
            self._raise_closed()
        if self._file.pristine:
            self._mark_dirty()
        self._is_begun = True

    def _create_under_stripe(
        self,
        key: str,
        key_hash: int,
        encoded_key: bytes,
        encoded: bytes,
        lifetime: int,
        times: tuple[int, int] | None,
    ) -> int:
        slots, slab, records = self._slots, self._slab, self._records
        now_ms = clock.now_ms()
        try:
            slot = slots.find(key_hash, encoded_key)
            while slot > 0:  # more than once where damage gave a key two slots
                if not slots.is_expired(slot, now_ms):
                    raise _exists_error(key)
                slots.delete(slot, encoded_key)
                self._file.require_full_flush()
                slot = slots.find(key_hash, encoded_key)
            used = slots.used_slot_count(-slot) if slot else SEGMENT_SLOTS
            if used >= SPLIT_AT and (not slot or used % _RETRY_EVERY == 0):
                slot = self._find_after_split(key_hash, encoded_key, now_ms)
            expires_at = now_ms + lifetime if lifetime else 0
            if times is not None:
                now_ms, expires_at = times
            taken: list[int] = []
            try:
                record = slab.allocate(RECORD_HEADER_SIZE + len(encoded_key) + len(encoded), taken)
                records.write_record(record, encoded_key, encoded, key_hash, now_ms, expires_at)
                slots.insert(-slot, key_hash, encoded_key, record, len(encoded), expires_at)
                if not self._file.in_place:
                    records.finish_record(record)
            except BaseException:
                self._give_up(-slot, taken)
                raise
        except KVStoreError:
            raise
        except BaseException:
            self._file.require_rebuild()
            raise
        return record

    def _give_up(self, slot: int, taken: list[int]) -> None:
        """Rollback a `create` that was cut short, unless its record is in its slot already."""
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

    def _find_after_split(self, key_hash: int, encoded_key: bytes, now_ms: int) -> int:
        """Rewrite a segment that is getting full; return the free slot, which there is then."""
        self._segments.split_or_compact(key_hash, now_ms)
        slot = self._slots.find(key_hash, encoded_key)
        if slot > 0:
            # Damage had led its slot astray, and the rewriting has put it where it is found.
            raise _exists_error(encoded_key.decode())
        if not slot:
            raise StoreFullError(
                f"{self._path}: the table's segment for this key has all of its {SEGMENT_SLOTS:,} "
                f"slots in use and no extent is left to split it; delete something first"
            )
        return slot

    def read(self, key: str) -> Value:
        """Return the value of `key` as a new dict.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its bytes in the file are damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        return decode_value(key, self.read_bytes(key))

    __getitem__ = read

    def read_bytes(self, key: str) -> bytes:
        """Return the value of `key` as JSON in UTF-8, not parsed. Raises as `read`."""
        encoded_key = encode_key(key)
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        inside = thread.inside
        if inside._is_owned():
            self._check_reentry(False)
        try:
            with inside, self._stripes[key_hash >> STRIPE_SHIFT]:
                if self._closed:
                    self._raise_closed()
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
                tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
                header, encoded = self._records.read_record(tail)
        finally:
            if waiting:
                leave()
        if not verify(header, encoded, tail, expires_at, key_hash):
            raise _damaged_error(key, slot, tail & SLOT_RECORD_MASK)
        return encoded

    @overload
    def get(self, key: str) -> Value | None: ...
    @overload
    def get(self, key: str, default: Default) -> Value | Default: ...
    def get(self, key: str, default: object = None) -> object:
        """Return the value of `key`, or `default` where it is absent; else raise as `read`."""
        try:
            return self.read(key)
        except KeyNotFoundError:
            return default

    def delete(self, key: str) -> None:
        """Remove `key`.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            StoreFullError: a copy-on-write file system has no room to overwrite; nothing changed.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        encoded_key = encode_key(key)
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        if not self._is_begun:
            self._begin()
        inside = thread.inside
        if inside._is_owned():
            self._check_reentry(self._durable)
        try:
            with inside, self._stripes[key_hash >> STRIPE_SHIFT]:
                if self._closed:
                    self._raise_closed()
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
                try:
                    record = self._slots.delete(slot, encoded_key)
                    if self._durable:
                        self._file.record_cleared(record)
                except KVStoreError:
                    raise
                except BaseException:
                    self._file.require_rebuild()
                    raise
        finally:
            if waiting:
                leave()
        if self._durable:
            self._file.flush_record(record, FREE_BLOCK.size)

    def ttl(self, key: str) -> int | None:
        """Return the whole seconds until `key` expires, rounded up; None if it never does.

        Takes one stripe, reads no value, writes nothing.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its slot and its record do not agree on that; one is damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        found = self._expiry(encode_key(key), key)
        if found is None:
            raise KeyNotFoundError(key)
        expires_at, now_ms = found
        return -((now_ms - expires_at) // 1000) if expires_at else None

    def __contains__(self, key: object) -> bool:
        """Return whether `read` would find `key`; False for what cannot be a key."""
        try:
            encoded_key = encode_key(key)
        except InvalidKeyError:
            if self._closed:
                self._raise_closed()
            return False
        return self._expiry(encoded_key) is not None

    def _expiry(self, encoded_key: bytes, key: str | None = None) -> tuple[int, int] | None:
        """Return a key's expires_at and the time now, in ms; None where the key is absent.

        Raises CorruptStoreError where its record says otherwise, if it has a `key` to name.
        """
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        inside = thread.inside
        if inside._is_owned():
            self._check_reentry(False)
        try:
            with inside, self._stripes[key_hash >> STRIPE_SHIFT]:
                if self._closed:
                    self._raise_closed()
                slot = self._slots.find(key_hash, encoded_key)
                if slot <= 0:
                    return None
                expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
                now_ms = clock.now_ms() if expires_at else 0
                if expires_at and self._slots.is_expired(slot, now_ms):
                    return None
                if key is not None:
                    record = self._words[slot + SLOT_RECORD_OFFSET >> 3] & SLOT_RECORD_MASK
                    if self._records.expiry_at(record) != expires_at:
                        raise _damaged_error(key, slot, record)
                return expires_at, now_ms
        finally:
            if waiting:
                leave()


def _exists_error(key: str) -> KeyExistsError:
    return KeyExistsError(f"key {key!r}: exists already; delete it first")


def _damaged_error(key: str, slot: int, record: int) -> CorruptStoreError:
    return CorruptStoreError(
        f"key {key!r}: the record at byte {record:,} fails its checksum, or is not the one that "
        f"its slot at byte {slot:,} tells of; delete the key"
    )


if not TYPE_CHECKING and compiled is not None:

    class Operations(compiled.Operations, Operations):
        """The compiled twin. What is rare it has from the plain one."""

        _exists_error, _damaged_error = staticmethod(_exists_error), staticmethod(_damaged_error)
