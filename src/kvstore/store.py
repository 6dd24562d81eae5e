"""`KVStore`: what a program calls. It checks arguments, takes locks and orders the steps.

Locks, always in this order: stripe, then the space lock of `extents`, then what `datafile` has for
itself. Two stripes are held at once only where all of them are, taken in the order of their numbers
by `_with_all_stripes`. No lock is held while a value is encoded, verified or parsed, nor while the
disk flushes.

An operation on one key first asks the store's fast path, if it has one, which does the common case
or says that it has done nothing (None): then the code here does all of it.
"""

import atexit
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from threading import get_ident
from typing import Final, NoReturn, Self, SupportsIndex, TypeVar, overload
from weakref import WeakSet

from orjson import JSONDecodeError, loads
from xxhash import xxh3_64_intdigest

from . import clock, compiled
from .changes import Changes, damaged_error, exists_error
from .compiled import FastPath, Lock, OwnedLock
from .errors import (
    CorruptStoreError,
    InvalidKeyError,
    KeyNotFoundError,
    KVStoreError,
    StoreBusyError,
    StoreClosedError,
    StoreFullError,
)
from .file.reentry import (
    begin_inside,
    close_at_end,
    close_reporting,
    is_inside,
    leave,
    operation,
    thread,
    waiting,
)
from .format.codec import Value, check_ttl, decode_value, encode_key, encode_value
from .format.layout import (
    DIRECTORY_ENTRIES,
    FREE_BLOCK,
    MAX_FILE_SIZE,
    MIN_MAX_BYTES,
    RECORD_HEADER_SIZE,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    STRIPE_COUNT,
    STRIPE_SHIFT,
)
from .index.buckets import wanted_shape
from .index.extents import Extents
from .index.records import Records, verify
from .index.segments import Segments
from .index.slab import Slab
from .index.slots import Slots
from .index.stats import StoreStats, count_extents
from .recovery.opening import open_file
from .views import StoreItems, StoreValues

Result = TypeVar("Result")
Default = TypeVar("Default")

_RECORD_SIZE_SHIFT: Final = SLOT_RECORD_MASK.bit_length()
_DIRECTORY_PER_STRIPE: Final = DIRECTORY_ENTRIES // STRIPE_COUNT

_stores: "WeakSet[KVStore]" = WeakSet()


class KVStore(Mapping[str, Value]):
    """An embedded key-value store in one file, for one process and any number of its threads.

    Keys are strings of 1 to 32 characters, values dicts of at most 16,384 bytes of JSON.

    >>> import tempfile
    >>> with KVStore(tempfile.mkdtemp() + "/data.kvs") as store:
    ...     store.create("user:1", {"name": "Ada"}, ttl=3600)
    ...     store.read("user:1")
    ...     store.delete("user:1")
    ...     "user:1" in store
    {'name': 'Ada'}
    False

    Args:
        path: the file; a missing one, an empty one, and one of zeros becomes a new store. None: the
            default file, see `kvstore.location`.
        max_bytes: the file does not grow past this, 4 MiB to 1,000,000,000. Not stored in the file.
        durable: True: `create` and `delete` return when the change is on stable storage. False: a
            change survives the death of the process at once, power loss after `sync` or `close`.
        timeout: seconds to wait for another process to let go of the file.

    Raises:
        ValueError: `max_bytes` or `timeout` is out of range.
        StoreLockedError: another process has the file after `timeout`, or this one has it already.
        UnsupportedFormatError: the file is no store, or is of another format.
        CorruptStoreError: the file was cut off, both its superblocks are damaged, or its index is
            and to rebuild it would lose records.
        StoreFullError: the disk has no room for a new file, or to fill the holes of one.
        OSError: the path cannot be opened for reading and writing.
    """

    _creates = True  # the file, where there is none; not so for a tool that only looks into it

    # What is asked for before a store is opened, and where it never is.
    _fast: FastPath | None = None
    _seed: int = 0
    _stripes: tuple[OwnedLock, ...] = tuple(Lock() for _ in range(STRIPE_COUNT))
    _durable: bool = False
    _closed: bool = True
    _inside: set[int] = set()  # noqa: RUF012 - of no store: each that is opened has its own
    _was_initialized: bool = False
    _was_open: bool = False
    _is_begun: bool = False

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = MAX_FILE_SIZE,
        durable: bool = False,
        timeout: float = 0.0,
    ) -> None:
        if self._was_initialized:
            raise TypeError(
                f"{self!r}: __init__ was called again; a store is opened once, make a new one"
            )
        self._was_initialized = True
        max_bytes = _check_max_bytes(max_bytes)
        timeout = _check_timeout(timeout)
        self._path = _resolve(path)
        self._durable = bool(durable)
        self._max_bytes = max_bytes
        self._file = open_file(
            str(self._path),
            max_bytes,
            timeout,
            clock.now_ms(),
            durable=self._durable,
            create=self._creates,
        )
        try:
            self._extents = extents = Extents(self._file)
            self._slab = slab = Slab(self._file, extents)
            self._space = extents.lock
            if not self._file.trusted:
                from .recovery.rebuild import rebuild  # after a crash only

                rebuild(self._file, extents, slab, clock.now_ms())
            self._records = records = Records(self._file)
            self._slots = slots = Slots(self._file, slab, records)
            self._segments = Segments(self._file, extents, slab, slots, compiled.selected)
            self._words = self._file.words
            self._seed = self._file.hash_seed
            self._inside = set()
            self._closing = Lock()
            self._stripes = tuple(Lock() for _ in range(STRIPE_COUNT))
            self._fast = self._make_fast_path()
            self._changes = Changes(self._file, slab, records, slots, self._segments, self._fast)
            self._file.call_after_fork(self._detach_after_fork)
            _stores.add(self)
            self._closed = False  # in this one step it is open
        except BaseException:
            if self._closed:
                self._let_go_of_map()
                self._file.give_up()
            raise

    def _make_fast_path(self) -> FastPath | None:
        make = compiled.selected.make_fast_path
        if make is None:
            return None
        fast = make(
            self._file.map,
            self._file.live,
            self._slab.spare,
            self._slab.looked_at,
            self._stripes,
            self._space,
            self._seed,
            wanted_shape(self._file),
            vars(clock),
        )
        self._slab.fast = self._slots.fast = fast
        return fast

    def _let_go_of_map(self) -> None:
        if self._fast is not None:
            self._fast.close()

    # --- one key -------------------------------------------------------------------------------

    def create(self, key: str, value: Value, ttl: int | None = None) -> None:
        """Store `value` under `key`, for `ttl` whole seconds or for ever.

        Raises:
            InvalidKeyError, InvalidTTLError: `key` or `ttl` is not what the store takes.
            InvalidValueError: `value` would not read back equal.
            ValueTooLargeError: it takes more than 16,384 bytes of JSON.
            KeyExistsError: `key` is there and has not expired.
            StoreFullError: no room, after what had expired was taken back.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        fast, encoded = self._fast, None
        if fast is not None:
            done = fast.create(key, value, ttl)
            if type(done) is int:
                if not done:
                    raise exists_error(key)
                if self._durable:
                    self._file.flush_record(done & SLOT_RECORD_MASK, done >> _RECORD_SIZE_SHIFT)
                return
            encoded = done if type(done) is bytes else None
        encoded_key = encode_key(key)
        lifetime = 0 if ttl is None else check_ttl(key, ttl)
        if encoded is None:
            encoded = encode_value(key, value)
        record = self._create_or_purge(key, encoded_key, encoded, lifetime)
        if self._durable:
            size = RECORD_HEADER_SIZE + len(encoded_key) + len(encoded)
            self._file.flush_record(record, size)

    def _restore(self, key: str, encoded: bytes, created_at: int, expires_at: int) -> None:
        """Create a key whose value is encoded already, with the times that it had elsewhere.

        For tools that carry records from file to file. Raises as `create`.
        """
        self._create(key, encode_key(key), encoded, 0, (created_at, expires_at))

    def _create_or_purge(self, key: str, encoded_key: bytes, encoded: bytes, lifetime: int) -> int:
        try:
            return self._create(key, encoded_key, encoded, lifetime)
        except StoreFullError:
            if self._file.read_only:
                raise
        # Tried again even if another thread was the one to take something back.
        self._purge_for_room()
        return self._create(key, encoded_key, encoded, lifetime)

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
                now_ms = clock.now_ms()
                created_at, expires_at = times or (now_ms, now_ms + lifetime if lifetime else 0)
                return self._changes.create(
                    key, key_hash, encoded_key, encoded, now_ms, created_at, expires_at
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
        if self._fast is not None:
            self._fast.begin()

    def read(self, key: str) -> Value:
        """Return the value of `key` as a new dict.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its bytes in the file are damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        fast = self._fast
        encoded = None if fast is None else fast.read_bytes(key)
        if not encoded:
            if encoded is not None:
                raise KeyNotFoundError(key)
            encoded = self._read_bytes(key)
        try:
            return loads(encoded)  # type: ignore[no-any-return]
        except JSONDecodeError:
            return decode_value(key, encoded)

    __getitem__ = read

    def read_bytes(self, key: str) -> bytes:
        """Return the value of `key` as JSON in UTF-8, not parsed. Raises as `read`."""
        fast = self._fast
        encoded = None if fast is None else fast.read_bytes(key)
        if not encoded:
            if encoded is not None:
                raise KeyNotFoundError(key)
            encoded = self._read_bytes(key)
        return encoded

    def _read_bytes(self, key: str) -> bytes:
        encoded_key = encode_key(key)
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        inside = thread.inside
        if inside._is_owned():
            self._check_reentry(False)
        try:
            with inside, self._stripes[key_hash >> STRIPE_SHIFT]:
                if self._closed:
                    self._raise_closed()
                slot, expires_at = self._changes.find_live(key, key_hash, encoded_key)
                tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
                header, encoded = self._records.read_record(tail)
        finally:
            if waiting:
                leave()
        if not verify(header, encoded, tail, expires_at, key_hash):
            raise damaged_error(key, slot, tail & SLOT_RECORD_MASK)
        return encoded

    @overload
    def get(self, key: str) -> Value | None: ...
    @overload
    def get(self, key: str, default: Default) -> Value | Default: ...
    def get(self, key: str, default: object = None) -> object:
        """Return the value of `key`, or `default` where it is absent; else raise as `read`."""
        fast = self._fast
        encoded = None if fast is None else fast.read_bytes(key)
        if encoded is False:
            return default
        try:
            return loads(encoded or self._read_bytes(key))
        except KeyNotFoundError:
            return default
        except JSONDecodeError:
            return self.read(key)  # which raises

    def delete(self, key: str) -> None:
        """Remove `key`.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            StoreFullError: a copy-on-write file system has no room to overwrite; nothing changed.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        # With `durable`, the cleared record is noted under its stripe.
        if self._fast is not None and not self._durable:
            done = self._fast.delete(key)
            if done:
                return
            if done is not None:
                raise KeyNotFoundError(key)
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
                record = self._changes.delete(key, key_hash, encoded_key, owes_flush=self._durable)
        finally:
            if waiting:
                leave()
        if self._durable:
            self._file.flush_record(record, FREE_BLOCK.size)

    def __delitem__(self, key: str) -> None:
        self.delete(key)

    def ttl(self, key: str) -> int | None:
        """Return the whole seconds until `key` expires, rounded up; None if it never does.

        Takes one stripe, reads no value, writes nothing.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its slot and its record do not agree on that; one is damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        found = None if self._fast is None else self._fast.expiry(key)
        if found is None:
            found = self._expiry(encode_key(key), key)
        if found is True:
            return None
        if found is False:
            raise KeyNotFoundError(key)
        expires_at, now_ms = found
        return -((now_ms - expires_at) // 1000)

    def __contains__(self, key: object) -> bool:
        """Return whether `read` would find `key`; False for what cannot be a key."""
        found = None if self._fast is None else self._fast.expiry(key)
        if found is not None:
            return bool(found)
        try:
            encoded_key = encode_key(key)
        except InvalidKeyError:
            if self._closed:
                self._raise_closed()
            return False
        return bool(self._expiry(encoded_key))

    def _expiry(self, encoded_key: bytes, key: str | None = None) -> bool | tuple[int, int]:
        """Return whether a key is there; if it has an expires_at, that and the time now, in ms.

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

    # --- one key, for tools --------------------------------------------------------------------

    def _whole(self, key: str) -> tuple[bytes, int, int]:
        """Return a key's value as JSON, its created_at and its expires_at. Raises as `read`."""
        value = self.read_bytes(key)
        encoded_key = key.encode()
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        header = self._header_of(key_hash, encoded_key)
        _, created_at, expires_at, _ = header
        return value, created_at, expires_at

    @operation(flushes=False)
    def _header_of(self, key_hash: int, encoded_key: bytes) -> tuple[int, int, int, int]:
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            slot = self._slots.find(key_hash, encoded_key)
            return self._records.read_record(self._words[slot + SLOT_RECORD_OFFSET >> 3])[0]

    # --- all keys ------------------------------------------------------------------------------

    @operation(flushes=False)
    def __len__(self) -> int:
        """Return the number of keys that `read` would find now, all at one moment.

        Looks at a few bytes of each segment, and into those pages that hold something expired.
        Other operations wait meanwhile: microseconds for each thousand keys, and half a microsecond
        for each that has expired and was not yet taken back; see `purge_expired`.
        """
        return self._with_all_stripes(self._count)

    def _count(self) -> int:
        if self._closed:
            self._raise_closed()
        now_ms = clock.now_ms()
        return sum(
            self._segments.count(extent, now_ms)
            for number in range(STRIPE_COUNT)
            for extent in self._segments.segments(number)
        )

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, in no order.

        Copies the keys of one segment at a time, up to 1,280, and holds no lock while it yields. A
        key that is there throughout is seen once, whatever other threads do.

        Raises:
            CorruptStoreError: after all keys that can be told, where damage hides others.
        """
        if self._closed:
            self._raise_closed()
        return self._iterate()

    def _iterate(self) -> Iterator[str]:
        # A segment only ever splits, so the end of its run is the start of another's permanently.
        position = 0
        damage: list[str] = []
        while position < DIRECTORY_ENTRIES:
            keys, position, found = self._keys_at(position)
            damage += found
            for key in keys:
                try:
                    yield key.decode()
                except UnicodeDecodeError as error:
                    damage.append(f"{self._path}: a slot's key is no UTF-8: {error}")
        if damage:
            raise CorruptStoreError(
                f"{damage[0]}; keys may be missing from the iteration that ends here "
                f"(findings: {len(damage)})"
            )

    @operation(flushes=False)
    def _keys_at(self, position: int) -> tuple[list[bytes], int, list[str]]:
        with self._stripes[position // _DIRECTORY_PER_STRIPE]:
            if self._closed:
                self._raise_closed()
            return self._segments.segment_keys(position, clock.now_ms())

    def items(self) -> "StoreItems":
        """Return a view of the (key, value) pairs; iterating it is like iterating the keys."""
        return StoreItems(self)

    def values(self) -> "StoreValues":
        """Return a view of the values; iterating it is like iterating the keys."""
        return StoreValues(self)

    @operation(flushes=True)
    def purge_expired(self) -> int:
        """Take back the space of expired records and return their number.

        Raises:
            StoreClosedError: the store is closed, or was opened before a fork.
            StoreFullError: a copy-on-write file system has no room to overwrite.
        """
        return self._purge()

    def _purge(self) -> int:
        purged = 0
        for number in range(STRIPE_COUNT):
            position = number * _DIRECTORY_PER_STRIPE
            while position < (number + 1) * _DIRECTORY_PER_STRIPE:
                # One segment under the stripe at a time: others get their turn in between.
                with self._stripes[number]:
                    if self._closed:
                        self._raise_closed()
                    extent, position, due = self._segments.segment_expiry(position, clock.now_ms())
                if due:
                    if self._file.pristine:
                        self._mark_dirty_alone()
                    with self._stripes[number]:
                        if self._closed:
                            self._raise_closed()
                        try:
                            # Each time anew: what was created after the clock was set back has
                            # not expired by an earlier reading of it.
                            purged += self._segments.purge(extent, clock.now_ms())
                        except KVStoreError:
                            raise
                        except BaseException:
                            self._file.require_rebuild()
                            raise
        if purged and self._durable:
            self._file.flush()
        return purged

    @operation(flushes=True)
    def _purge_for_room(self) -> None:
        with suppress(StoreFullError, CorruptStoreError):
            self._purge()
            self._slab.free_pending()
            # Whoever wants a segment has use for an extent only if it is no class's, and flushed.
            self._slab.free_spare()
        if self._extents.waits_for_flush:
            self._file.flush()

    # --- the store -----------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The file, as an absolute path."""
        if self._is_half_made():
            self._raise_closed()
        return self._path

    @property
    def closed(self) -> bool:
        """Whether the store was closed, or belongs to the parent of this forked process."""
        return self._closed

    @operation(flushes=True)
    def sync(self) -> None:
        """Return when everything acknowledged before the call is on stable storage.

        Raises:
            OSError: the disk did not take it, now or at any time since the store was opened; or the
                file was removed or replaced while it was open.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        if self._closed:
            self._raise_closed()
        self._file.flush()
        self._file.check_path()

    @operation(flushes=False)
    def stats(self) -> StoreStats:
        """Count what is in the file, all at one moment.

        Looks at 16 bytes of every extent; other operations wait meanwhile.
        """
        return self._with_all_stripes(self._count_extents)

    def _count_extents(self) -> StoreStats:
        if self._closed:
            self._raise_closed()
        with self._space:
            return count_extents(self._file, self._max_bytes)

    def close(self) -> None:
        """Flush, let go of the file, and refuse all use from now on. A second call does nothing.

        Runs by itself at the end of a `with` block and when the interpreter exits. Called by a
        signal handler, a finalizer or a trace function amid an operation of this very thread, it
        returns at once, and the store is closed as soon as that operation has ended; what goes
        wrong then is reported to `sys.excepthook`.

        Raises:
            OSError: a flush failed, or the file was removed or replaced; it is closed all the same.
        """
        if self._is_half_made():
            return
        if not self._closed and self._file.owned_by_parent:
            # Here before `_detach_after_fork`: collected as garbage, or closed by a function that
            # the program had registered to run in forked children before it imported this package.
            self._detach_after_fork()
        if self._closed and (self._file.released or self._file.owned_by_parent):
            return
        if is_inside() and self._is_busy_here():
            close_at_end(self)
            return
        try:
            with thread.inside:
                self._close()
        finally:
            if waiting:
                leave()

    def _is_busy_here(self) -> bool:
        """Return whether this thread must not wait until it can close the store.

        It is inside an operation on it; or whoever closes it already, be it another thread, may be
        waiting for what this one holds.
        """
        if self._closed or get_ident() in self._inside or self._is_held_here(True):
            return True
        try:
            begin_inside(str(self._path))
        except StoreBusyError:
            return True
        return False

    def _is_held_here(self, flushes: bool) -> bool:
        """Return whether this very thread holds a lock that an operation may need."""
        locks = (self._closing, *self._stripes, self._space)
        return any(lock._is_owned() for lock in locks) or self._file.is_held_here(flushes)

    def _close(self) -> None:
        with self._closing:
            # One that was interrupted on its way is ended by the next.
            if self._closed and (self._file.released or self._file.owned_by_parent):
                return
            try:
                self._with_all_stripes(self._set_closed)
            finally:
                if self._closed:
                    self._let_go_of_map()  # as where a fork came in between
                    self._file.close()

    def _set_closed(self) -> None:
        try:
            if not self._closed:
                self._slab.free_spare()
        except BaseException as error:
            self._file.require_rebuild()
            if not isinstance(error, KVStoreError | OSError):
                raise
        finally:
            self._let_go_of_map()
            self._was_open = True
            self._closed = True

    def _is_half_made(self) -> bool:
        """Return whether `__init__` was not called, has not ended or has failed."""
        return self._closed and not self._was_open

    def __enter__(self) -> Self:
        if self._closed:
            self._raise_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"{self!r}: a store cannot be copied or pickled, for it is an open file; keep its path "
            f"instead, or share the store itself between threads"
        )

    def __repr__(self) -> str:
        if self._is_half_made():
            return "<KVStore, not opened>"
        state = "closed" if self._closed else "open"
        return f"<KVStore {str(self._path)!r}, {state}>"

    # A store is equal to itself only: comparing contents would read all of two files.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _with_all_stripes(self, act: Callable[[], Result], first: int = 0) -> Result:
        """Return what `act` does while no other thread is in the table.

        Recursive, for a `with` statement lets go of its lock whatever interrupts it.
        """
        if first == STRIPE_COUNT:
            return act()
        with self._stripes[first]:
            return self._with_all_stripes(act, first + 1)

    @operation(flushes=True)
    def _mark_dirty(self) -> None:
        self._mark_dirty_alone()

    def _mark_dirty_alone(self) -> None:
        with self._closing:
            if self._closed:
                self._raise_closed()
            self._file.mark_dirty()

    def _check_reentry(self, flushes: bool) -> None:
        """Raise StoreBusyError unless an operation may begin amid the one of this very thread."""
        if self._closed:
            self._raise_closed()
        if self._is_held_here(flushes):
            raise StoreBusyError(
                f"{self._path}: this thread is inside an operation on the store already, which a "
                f"signal handler, a finalizer or a trace function has interrupted; try again once "
                f"that operation has ended"
            )
        begin_inside(str(self._path))

    def _raise_closed(self) -> NoReturn:
        if self._is_half_made():
            raise StoreClosedError(
                "the store was not opened: KVStore.__init__ was not called, has not ended or has "
                "failed"
            )
        raise StoreClosedError(
            f"{self._path}: the store is closed"
            if self._file.closed
            else f"{self._path}: the store belongs to the parent of this forked process"
        )

    def _reset_locks_after_fork(self) -> None:
        """In a forked child: other threads of the parent may have held these, and let go there."""
        self._stripes = tuple(Lock() for _ in range(STRIPE_COUNT))
        self._closing = Lock()

    def _detach_after_fork(self) -> None:
        """In a forked child: become a closed store without touching anything of the parent's."""
        self._let_go_of_map()
        self._reset_locks_after_fork()
        self._was_open = True
        self._closed = True
        self._file.detach_after_fork()


def _check_max_bytes(max_bytes: SupportsIndex) -> int:
    number = operator.index(max_bytes)
    if not MIN_MAX_BYTES <= number <= MAX_FILE_SIZE:
        raise ValueError(
            f"max_bytes is {number:,}, allowed are {MIN_MAX_BYTES:,} to {MAX_FILE_SIZE:,}"
        )
    return number


def _check_timeout(timeout: object) -> float:
    if isinstance(timeout, int | float) and isfinite(timeout) and timeout >= 0:
        return float(timeout)
    raise ValueError(f"timeout is {timeout!r}, allowed is a finite number of seconds, 0 or more")


def _resolve(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        from .location import default_path  # platformdirs is needed for this only

        return default_path()
    name = os.fspath(path)
    if not isinstance(name, str):
        raise TypeError(f"path is {name!r}, allowed is a str or os.PathLike of str, or None")
    if not name:
        raise FileNotFoundError(2, "the path is empty", name)
    return Path(os.path.abspath(name))


@atexit.register
def _close_all() -> None:
    for store in list(_stores):
        close_reporting(store)


def _reset_all_locks_after_fork() -> None:
    # A closed store too, which no lock on its file names: it takes a stripe to say that it is.
    for store in list(_stores):
        store._reset_locks_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all_locks_after_fork)
