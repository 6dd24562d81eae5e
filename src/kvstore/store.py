"""`KVStore`: checks arguments, locks, orders the steps of each operation, and does nothing else.

Locks, always in this order: stripe, then the space lock of `extents`, then what `datafile` has for
itself. Two stripes are held at once only where all of them are, taken in the order of their numbers
by `_with_all_stripes`. No lock is held while a value is encoded, verified or parsed, nor while the
disk flushes.
"""

import atexit
import operator
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import isfinite
from pathlib import Path
from time import time_ns
from typing import Final, NoReturn, Self, SupportsIndex, TypeVar, overload
from weakref import WeakSet

from xxhash import xxh3_64_intdigest

from .codec import MAX_TTL_SECONDS, check_ttl, decode_value, encode_key, encode_value
from .datafile import DataFile
from .errors import (
    CorruptStoreError,
    InvalidKeyError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreClosedError,
    StoreFullError,
)
from .extents import Extents
from .layout import (
    DIRECTORY_ENTRIES,
    MAX_FILE_SIZE,
    MIN_MAX_BYTES,
    RECORD_HEADER_SIZE,
    SEGMENT_SLOTS,
    SLOT_EXPIRES_OFFSET,
    SLOT_RECORD_MASK,
    SLOT_RECORD_OFFSET,
    SPLIT_AT,
    STRIPE_COUNT,
    STRIPE_SHIFT,
    TIME_LIMIT,
)
from .slab import Slab, verify
from .soundness import is_sound
from .stats import StoreStats, count_extents
from .table import Table
from .views import StoreItems, StoreValues, Value

Default = TypeVar("Default")
Result = TypeVar("Result")

# Beyond 7/8, where no extent could be had: how many inserts until that is tried again.
_RETRY_EVERY: Final = 16
# The last moment from which the longest time-to-live ends before `TIME_LIMIT`.
_LAST_MS: Final = TIME_LIMIT - 1 - MAX_TTL_SECONDS * 1000
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
        UnsupportedFormatError: the file is no store, or is of a newer format.
        CorruptStoreError: the file was cut off, or both its superblocks are damaged.
        StoreFullError: the disk has no room for a new file, or to fill the holes of one.
        OSError: the path cannot be opened for reading and writing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_bytes: int = MAX_FILE_SIZE,
        durable: bool = False,
        timeout: float = 0.0,
    ) -> None:
        self._closed = True  # until the last line: `__del__` runs even where this raises
        max_bytes = _check_max_bytes(max_bytes)
        timeout = _check_timeout(timeout)
        self._path = _resolve(path)
        self._durable = bool(durable)
        self._max_bytes = max_bytes
        self._file = DataFile(str(self._path), max_bytes, timeout, _now_ms())
        try:
            extents = Extents(self._file)
            self._slab = Slab(self._file, extents)
            self._table = Table(self._file, extents, self._slab)
            self._space = extents.lock
            if not (self._file.trusted and is_sound(self._file)):
                from .recovery import rebuild  # after a crash only

                rebuild(self._file, extents, self._slab, _now_ms())
        except BaseException:
            self._file.leave_unclean()
            self._file.close()
            raise
        self._words = self._file.words
        self._seed = self._file.hash_seed
        self._closing = threading.Lock()
        self._stripes = tuple(threading.Lock() for _ in range(STRIPE_COUNT))
        self._file.call_after_fork(self._abandon)
        _stores.add(self)
        self._closed = False

    # --- one key -------------------------------------------------------------------------------

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
            self._create(key, encoded_key, encoded, lifetime)
        except StoreFullError:
            if self._file.refuses:
                raise
            # Tried again even if another thread was the one to take something back.
            self._purge_for_room()
            self._create(key, encoded_key, encoded, lifetime)
        if self._durable:
            self._file.flush()

    def _restore(self, key: str, encoded: bytes, created_at: int, expires_at: int) -> None:
        """Create a key whose value is encoded already, with the times that it had elsewhere.

        For tools that carry records from file to file. Raises as `create`.
        """
        self._create(key, encode_key(key), encoded, 0, (created_at, expires_at))

    def _whole(self, key: str) -> tuple[bytes, int, int]:
        """Return a key's value as JSON, its created_at and its expires_at. Raises as `read`."""
        value = self.read_bytes(key)
        encoded_key = key.encode()
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            slot = self._table.find(key_hash, encoded_key)
            header, _ = self._slab.read_record(self._words[slot + SLOT_RECORD_OFFSET >> 3])
        _, created_at, expires_at, _ = header
        return value, created_at, expires_at

    def _create(
        self,
        key: str,
        encoded_key: bytes,
        encoded: bytes,
        lifetime: int,
        times: tuple[int, int] | None = None,
    ) -> None:
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        table, slab = self._table, self._slab
        if self._file.pristine:
            self._begin_changes()
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            if self._closed:
                self._refuse()
            now_ms = _now_ms()
            try:
                slot = table.find(key_hash, encoded_key)
                if slot > 0:
                    if not table.is_expired(slot, now_ms):
                        raise KeyExistsError(f"key {key!r}: exists already; delete it first")
                    table.delete(slot, encoded_key)
                    slot = table.find(key_hash, encoded_key)
                used = table.used(-slot) if slot else SEGMENT_SLOTS
                if used >= SPLIT_AT and (not slot or used % _RETRY_EVERY == 0):
                    slot = self._find_after_making_room(key_hash, encoded_key, now_ms)
                expires_at = now_ms + lifetime if lifetime else 0
                if times is not None:
                    now_ms, expires_at = times
                record = slab.take(RECORD_HEADER_SIZE + len(encoded_key) + len(encoded))
                try:
                    slab.write_record(record, encoded_key, encoded, key_hash, now_ms, expires_at)
                    table.insert(-slot, key_hash, encoded_key, record, len(encoded), expires_at)
                    if not self._file.in_place:
                        slab.finish_record(record)
                except BaseException:
                    if not (table.is_live(-slot) and slab.is_record(record)):
                        self._undo_create(-slot, record)
                    raise
            except KVStoreError:
                raise
            except BaseException:
                self._file.leave_unclean()
                raise

    def _undo_create(self, slot: int, record: int) -> None:
        """Give back the block of a record, and the slot if it got as far as that."""
        if self._table.is_live(slot):
            try:
                self._table.remove(slot)
            except (KVStoreError, OSError) as error:
                # Where the map is not private, the key seems damaged until the next opening, which
                # finds no record of it.
                self._file.refuse_changes(error)
                self._table.hide(slot)
                return
        self._slab.discard(record)

    def _find_after_making_room(self, key_hash: int, encoded_key: bytes, now_ms: int) -> int:
        """Rewrite a segment that is getting full; return the free slot, which there is then."""
        self._table.make_room(key_hash, now_ms)
        slot = self._table.find(key_hash, encoded_key)
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
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            if self._closed:
                self._refuse()
            slot = self._table.find(key_hash, encoded_key)
            if slot <= 0:
                raise KeyNotFoundError(f"key {key!r}: not in the store")
            expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
            if (
                expires_at
                and expires_at <= time_ns() // 1_000_000
                and self._table.is_expired(slot, _now_ms())
            ):
                raise KeyNotFoundError(f"key {key!r}: has expired")
            tail = self._words[slot + SLOT_RECORD_OFFSET >> 3]
            header, encoded = self._slab.read_record(tail)
        if not verify(header, encoded, tail, expires_at, key_hash):
            raise CorruptStoreError(
                f"key {key!r}: the record at byte {tail & SLOT_RECORD_MASK:,} fails its checksum, "
                f"or is not the one that its slot at byte {slot:,} tells of; delete the key"
            )
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
        if self._file.pristine:
            self._begin_changes()
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            if self._closed:
                self._refuse()
            slot = self._table.find(key_hash, encoded_key)
            if slot <= 0:
                raise KeyNotFoundError(f"key {key!r}: not in the store")
            expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
            if (
                expires_at
                and expires_at <= time_ns() // 1_000_000
                and self._table.is_expired(slot, _now_ms())
            ):
                raise KeyNotFoundError(f"key {key!r}: has expired")
            try:
                self._table.delete(slot, encoded_key)
            except KVStoreError:
                raise
            except BaseException:
                self._file.leave_unclean()
                raise
        if self._durable:
            self._file.flush()

    __delitem__ = delete

    def ttl(self, key: str) -> int | None:
        """Return the whole seconds until `key` expires, rounded up; None if it never does.

        Takes one stripe, reads no value, writes nothing.

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        found = self._expiry(encode_key(key))
        if found is None:
            raise KeyNotFoundError(f"key {key!r}: not in the store")
        expires_at, now_ms = found
        return -((now_ms - expires_at) // 1000) if expires_at else None

    def __contains__(self, key: object) -> bool:
        """Tell whether `read` would find `key`; False for what cannot be a key."""
        try:
            encoded_key = encode_key(key)
        except InvalidKeyError:
            if self._closed:
                self._refuse()
            return False
        return self._expiry(encoded_key) is not None

    def _expiry(self, encoded_key: bytes) -> tuple[int, int] | None:
        """Return a key's expires_at and the time now, in ms; None where the key is absent."""
        key_hash = xxh3_64_intdigest(encoded_key, self._seed)
        with self._stripes[key_hash >> STRIPE_SHIFT]:
            if self._closed:
                self._refuse()
            slot = self._table.find(key_hash, encoded_key)
            if slot <= 0:
                return None
            expires_at = self._words[slot + SLOT_EXPIRES_OFFSET >> 3]
            if not expires_at:
                return 0, 0
            now_ms = _now_ms()
            return None if self._table.is_expired(slot, now_ms) else (expires_at, now_ms)

    # --- all keys ------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of keys that `read` would find now, all at one moment.

        Looks at a few bytes of each segment, and into those pages that hold something expired.
        Other operations wait meanwhile: microseconds for each thousand keys, and half a microsecond
        for each that has expired and was not yet taken back; see `purge_expired`.
        """
        return self._with_all_stripes(self._count)

    def _count(self) -> int:
        if self._closed:
            self._refuse()
        now_ms = _now_ms()
        return sum(
            self._table.count(extent, now_ms)
            for number in range(STRIPE_COUNT)
            for extent in self._table.segments(number)
        )

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, in no order.

        Copies the keys of one segment at a time, up to 1,280, and holds no lock while it yields. A
        key that is there throughout is seen once, whatever other threads do.

        Raises:
            CorruptStoreError: after all keys that can be told, where damage hides others.
        """
        if self._closed:
            self._refuse()
        return self._iterate()

    def _iterate(self) -> Iterator[str]:
        # A segment only ever splits, so the end of its run is the start of another's for good.
        position = 0
        damage: list[str] = []
        while position < DIRECTORY_ENTRIES:
            with self._stripes[position // _DIRECTORY_PER_STRIPE]:
                if self._closed:
                    self._refuse()
                keys, position, found = self._table.keys_at(position, _now_ms())
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

    def items(self) -> "StoreItems":
        """Return a view of the (key, value) pairs; iterating it is like iterating the keys."""
        return StoreItems(self)

    def values(self) -> "StoreValues":
        """Return a view of the values; iterating it is like iterating the keys."""
        return StoreValues(self)

    def purge_expired(self) -> int:
        """Take back the space of expired records and return their number.

        Raises:
            StoreClosedError: the store is closed, or was opened before a fork.
            StoreFullError: a copy-on-write file system has no room to overwrite.
        """
        purged = 0
        for number in range(STRIPE_COUNT):
            position = number * _DIRECTORY_PER_STRIPE
            while position < (number + 1) * _DIRECTORY_PER_STRIPE:
                # One segment under the stripe at a time: others get their turn in between.
                with self._stripes[number]:
                    if self._closed:
                        self._refuse()
                    extent, position, due = self._table.due_at(position, _now_ms())
                if due:
                    if self._file.pristine:
                        self._begin_changes()
                    with self._stripes[number]:
                        if self._closed:
                            self._refuse()
                        try:
                            # Each time anew: what was created after the clock was set back has
                            # not expired by an earlier reading of it.
                            purged += self._table.purge(extent, _now_ms())
                        except KVStoreError:
                            raise
                        except BaseException:
                            self._file.leave_unclean()
                            raise
        if purged and self._durable:
            self._file.flush()
        return purged

    def _purge_for_room(self) -> None:
        with suppress(StoreFullError, CorruptStoreError):
            self.purge_expired()

    # --- the store -----------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The file, as an absolute path."""
        return self._path

    @property
    def closed(self) -> bool:
        """Whether the store was closed, or belongs to the parent of this forked process."""
        return self._closed

    def sync(self) -> None:
        """Return when everything acknowledged before the call is on stable storage.

        Raises:
            OSError: the disk did not take it, now or at any time since the store was opened; or the
                file was removed or replaced while it was open.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        if self._closed:
            self._refuse()
        self._file.flush()
        self._file.check_path()

    def stats(self) -> StoreStats:
        """Count what is in the file, all at one moment.

        Looks at 16 bytes of every extent; other operations wait meanwhile.
        """
        return self._with_all_stripes(self._count_extents)

    def _count_extents(self) -> StoreStats:
        if self._closed:
            self._refuse()
        with self._space:
            return count_extents(self._file, self._max_bytes)

    def close(self) -> None:
        """Flush, let go of the file, and refuse all use from now on. A second call does nothing.

        Runs by itself at the end of a `with` block and when the interpreter exits.

        Raises:
            OSError: a flush failed, or the file was removed or replaced; it is closed all the same.
        """
        if not self._closed and self._file.is_parents:
            # Here before `_abandon`: collected as garbage, or closed by a function that the program
            # had registered to run in forked children before it imported this package.
            self._abandon()
        with self._closing:
            # One that was interrupted on its way is ended by the next.
            if self._closed and (self._file.let_go or self._file.is_parents):
                return
            try:
                self._with_all_stripes(self._set_closed)
            finally:
                if self._closed:
                    self._file.close()

    def _set_closed(self) -> None:
        self._closed = True

    def __enter__(self) -> Self:
        if self._closed:
            self._refuse()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self.close()

    def __repr__(self) -> str:
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

    def _begin_changes(self) -> None:
        with self._closing:
            if self._closed:
                self._refuse()
            self._file.begin_changes()

    def _refuse(self) -> NoReturn:
        raise StoreClosedError(
            f"{self._path}: the store is closed"
            if self._file.closed
            else f"{self._path}: the store belongs to the parent of this forked process"
        )

    def _renew_locks(self) -> None:
        """In a forked child: other threads of the parent may have held these, and let go there."""
        self._stripes = tuple(threading.Lock() for _ in range(STRIPE_COUNT))
        self._closing = threading.Lock()

    def _abandon(self) -> None:
        """In a forked child: become a closed store without touching anything of the parent's."""
        self._renew_locks()
        self._closed = True
        self._file.abandon()


def _now_ms() -> int:
    """Return the time as the file has it.

    A clock set to before 1970 stands still there; one so far ahead that not every expiry could be
    stored, in the year 10,572, likewise.
    """
    now_ms = time_ns() // 1_000_000
    if 0 <= now_ms <= _LAST_MS:
        return now_ms
    return 0 if now_ms < 0 else _LAST_MS


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
        try:
            store.close()
        except Exception:  # one store's trouble must not keep the others from being closed
            sys.excepthook(*sys.exc_info())


def _renew_all_locks() -> None:
    # A closed store too, which no lock on its file names: it takes a stripe to say that it is.
    for store in list(_stores):
        store._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all_locks)
