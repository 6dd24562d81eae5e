"""`KVStore`: what a program calls. It checks arguments and orders the steps.

An operation on one key first asks the store's fast path, if it has one, which does the common case
or says that it has done nothing (None): then `one_key` does all of it. `locks` has who may take
what, and in which order.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, SupportsIndex, TypeVar, overload
from weakref import WeakSet

from orjson import JSONDecodeError, loads

from . import clock
from .all_keys import AllKeys
from .changes import exists_error
from .errors import (
    InvalidKeyError,
    KeyExistsError,
    KeyNotFoundError,
    StoreFullError,
)
from .file.platform import system
from .file.reentry import close_at_end, close_reporting, is_inside, leave, thread, waiting
from .file.remote import warn_if_remote
from .format.codec import Value, check_ttl, decode_value, encode_key, encode_value
from .format.layout import (
    MAX_FILE_SIZE,
    RECORD_HEADER_SIZE,
    SLOT_RECORD_MASK,
)
from .index.slab import Slab
from .index.stats import StoreStats
from .locks import NOT_OPENED, StoreLocks, operation
from .many_keys import (
    Items,
    SupportsKeys,
    Written,
    delete_many,
    pairs_of,
    put_many,
    read_many,
)
from .one_key import OneKey
from .parts import Parts, check_max_bytes, check_timeout, resolve
from .views import StoreItems, StoreValues

if TYPE_CHECKING:
    from .compiled.interface import FastPath

Default = TypeVar("Default")
Result = TypeVar("Result")


class _Missing:
    """What stands for a default that was not given."""

    def __repr__(self) -> str:
        return "<no default>"


_MISSING: Final = _Missing()
_RECORD_SIZE_SHIFT: Final = SLOT_RECORD_MASK.bit_length()

_stores: "WeakSet[KVStore[Any]]" = WeakSet()


class KVStore(MutableMapping[str, Value]):
    """An embedded key-value store in one file, for one process and any number of its threads.

    Keys are strings of 1 to 32 characters, values dicts of at most 16,384 bytes of JSON.

    >>> with KVStore("data.kvs") as store:
    ...     store.create("user:1", {"name": "Ada"}, ttl=3600)
    ...     store.read("user:1")
    ...     store.delete("user:1")
    ...     "user:1" in store
    {'name': 'Ada'}
    False

    To a type checker values are `dict[str, Any]`, or what the store is annotated with: as
    `KVStore[Settings]` for a `TypedDict`, as `KVStore[Any]` for several. Nothing of that is checked
    as the program runs.

    >>> from typing import TypedDict
    >>> class Settings(TypedDict):
    ...     theme: str
    >>> with KVStore[Settings]("data.kvs") as store:
    ...     store.put("settings", {"theme": "dark"})
    ...     settings: Settings = store.read("settings")

    Args:
        path: the file; a missing one, an empty one, and one of zeros becomes a new store. None: the
            default file, see `kvstore.location`.
        max_bytes: the file does not grow past this, 4 MiB to 1,000,000,000. Not stored in the file.
        durable: True: what changes a key returns when the change is on stable storage. False: a
            change survives the death of the process at once, power loss after `sync` or `close`.
        timeout: seconds to wait for another process to let go of the file.

    Raises:
        ValueError: `max_bytes` or `timeout` is out of range.
        StoreLockedError: another process has the file after `timeout`, or this one has it already.
        UnsupportedFormatError: the file is no store, or is of another format.
        CorruptStoreError: the file was cut off, both its superblocks are damaged, or its index is
            and to rebuild it would lose records.
        StoreFullError: the disk has no room for a new file, or to fill the holes of one.
        OSError: the path cannot be opened for reading and writing, or the file not be mapped.

    Warns:
        RuntimeWarning: the path is on a network file system or the like, once for each path.
    """

    _creates = True  # the file, where there is none; not so for a tool that only looks into it

    # What is asked for before a store is opened, and where it never is.
    if TYPE_CHECKING:
        _fast: FastPath | None
    _fast = None
    _locks: StoreLocks = NOT_OPENED
    _slab: Slab = NOT_OPENED
    _one_key: OneKey = NOT_OPENED
    _all_keys: AllKeys = NOT_OPENED
    _was_initialized = _durable = False

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
        max_bytes = check_max_bytes(max_bytes)
        timeout = check_timeout(timeout)
        self._path = resolve(path)
        self._durable = bool(durable)
        self._parts = parts = Parts(
            str(self._path),
            max_bytes=max_bytes,
            timeout=timeout,
            durable=self._durable,
            create=self._creates,
        )
        try:
            self._file, self._slab, self._locks = parts.file, parts.slab, parts.locks
            self._one_key, self._all_keys = parts.one_key, parts.all_keys
            warn_if_remote(self._file.fd, self._file.path)
            self._file.call_after_fork(self._detach_after_fork)
            _stores.add(self)
            self._locks.closed = False  # in this one step it is open
        except BaseException:
            if parts.locks.closed:
                parts.give_up()
            raise
        self._fast = parts.fast  # it does not ask whether the store is open, so not before that

    # --- one key -------------------------------------------------------------------------------

    def create(self, key: str, value: Value, ttl: int | None = None) -> None:
        """Store `value` under `key`, for `ttl` whole seconds or for ever.

        >>> store.create("user:1", {"name": "Ada"}, ttl=3600)
        >>> store.read("user:1")
        {'name': 'Ada'}

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
        self._store(key, value, ttl, encoded, replace=False)

    def put(self, key: str, value: Value, ttl: int | None = None) -> None:
        """Store `value` under `key`, for `ttl` whole seconds or for ever, whatever was there.

        It takes the place of both value and time-to-live. A reader sees the old value or the new
        one, never neither, never a mixture; and so does whoever opens the file after a crash. After
        power loss the key has the value that was last synced, or a later one.

        >>> store.put("user:1", {"visits": 1}, ttl=3600)
        >>> store["user:1"] = {"visits": 2}
        >>> store["user:1"], store.ttl("user:1")
        ({'visits': 2}, None)

        Raises:
            InvalidKeyError, InvalidTTLError: `key` or `ttl` is not what the store takes.
            InvalidValueError: `value` would not read back equal.
            ValueTooLargeError: it takes more than 16,384 bytes of JSON.
            StoreFullError: no room, after what had expired was taken back; the key is as it was.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        fast, encoded = self._fast, None
        if fast is not None:
            done = fast.put(key, value, ttl)
            if type(done) is int:
                if self._durable:
                    self._file.flush_record(done & SLOT_RECORD_MASK, done >> _RECORD_SIZE_SHIFT)
                return
            encoded = done if type(done) is bytes else None
        self._store(key, value, ttl, encoded, replace=True)

    def __setitem__(self, key: str, value: Value) -> None:
        self.put(key, value)

    def _store(
        self, key: str, value: Value, ttl: int | None, encoded: bytes | None, *, replace: bool
    ) -> None:
        """Create or put what is out of the ordinary; `encoded` is `value` where it is known."""
        record, size = self._store_unflushed(key, value, ttl, encoded, replace=replace)
        if self._durable:
            self._file.flush_record(record, size)

    def _store_unflushed(
        self,
        key: str,
        value: Value,
        ttl: int | None,
        encoded: bytes | None,
        *,
        replace: bool = True,
    ) -> tuple[int, int]:
        """Do so, and return offset and size of the record."""
        encoded_key = encode_key(key)
        lifetime = 0 if ttl is None else check_ttl(key, ttl)
        if encoded is None:
            encoded = encode_value(key, value)
        record = self._with_room(
            lambda: self._one_key.store(key, encoded_key, encoded, lifetime, replace=replace)
        )
        return record, RECORD_HEADER_SIZE + len(encoded_key) + len(encoded)

    def _with_room(self, store: Callable[[], Result]) -> Result:
        """Return what `store` does; where it finds no room, once what can be was taken back."""
        try:
            return store()
        except StoreFullError:
            if self._file.read_only or self._parts.room.is_full():
                raise
        finally:
            if self._slab.wants_reclaiming:
                self._parts.reclaimer.keep_up()
        step = 0
        while self._parts.room.make(step):
            # Tried again even if another thread was the one to make room.
            with suppress(StoreFullError):
                return store()
            step += 1
        with self._parts.room.growing():
            return store()

    def touch(self, key: str, ttl: int | None) -> None:
        """Give `key` another time-to-live, from now on: `ttl` whole seconds, or for ever.

        The value is verified and stored anew. One that has expired is not revived.

        >>> store.put("session:1", {"user": "ada"})
        >>> store.touch("session:1", 1800)
        >>> store.ttl("session:1")
        1800

        Raises:
            InvalidKeyError, InvalidTTLError: `key` or `ttl` is not what the store takes.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its bytes in the file are damaged.
            StoreFullError: no room for another record; the key is as it was.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` a flush.
        """
        done = None if self._fast is None else self._fast.touch(key, ttl)
        if done is False:
            raise KeyNotFoundError(key)
        if done is None:
            encoded_key = encode_key(key)
            lifetime = 0 if ttl is None else check_ttl(key, ttl)
            record, size = self._with_room(lambda: self._one_key.touch(key, encoded_key, lifetime))
        else:
            record, size = done & SLOT_RECORD_MASK, done >> _RECORD_SIZE_SHIFT
        if self._durable:
            self._file.flush_record(record, size)

    def setdefault(self, key: str, value: Value, ttl: int | None = None) -> Value:
        """Return the value of `key`; where it is absent, store `value` and return that as read.

        In one step: of threads that set a default at the same time, all get the same.

        >>> store.setdefault("settings", {"theme": "dark"})
        {'theme': 'dark'}
        >>> store.setdefault("settings", {"theme": "light"})
        {'theme': 'dark'}

        Raises: as `create` and `read`, without KeyExistsError.
        """
        while True:
            with suppress(KeyNotFoundError):
                return self.read(key)
            with suppress(KeyExistsError):  # another thread was faster
                self.create(key, value, ttl)
                return decode_value(key, encode_value(key, value))  # type: ignore[no-any-return]

    def _restore(
        self,
        key: str,
        encoded: bytes,
        created_at: int,
        expires_at: int,
        *,
        replace: bool = False,
    ) -> None:
        """Create or put a key whose value is encoded already, with the times that it had elsewhere.

        For tools that carry records from file to file. Raises as `create`, or as `put`.
        """
        times = created_at, expires_at
        encoded_key = encode_key(key)
        self._with_room(
            lambda: self._one_key.store(key, encoded_key, encoded, 0, replace=replace, times=times)
        )

    def read(self, key: str) -> Value:
        """Return the value of `key` as a new dict.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.read("user:1")
        {'name': 'Ada'}

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
            encoded = self._one_key.read_bytes(key, encode_key(key))
        try:
            return loads(encoded)  # type: ignore[no-any-return]
        except JSONDecodeError:
            return decode_value(key, encoded)  # type: ignore[no-any-return]

    __getitem__ = read

    def read_bytes(self, key: str) -> bytes:
        """Return the value of `key` as JSON in UTF-8, not parsed. Raises as `read`.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.read_bytes("user:1")
        b'{"name":"Ada"}'
        """
        fast = self._fast
        encoded = None if fast is None else fast.read_bytes(key)
        if not encoded:
            if encoded is not None:
                raise KeyNotFoundError(key)
            encoded = self._one_key.read_bytes(key, encode_key(key))
        return encoded

    @overload
    def get(self, key: str) -> Value | None: ...
    @overload
    def get(self, key: str, default: Default) -> Value | Default: ...
    def get(self, key: str, default: object = None) -> object:
        """Return the value of `key`, or `default` where it is absent; else raise as `read`.

        >>> store.get("user:2", {"name": "nobody"})
        {'name': 'nobody'}
        """
        fast = self._fast
        encoded = None if fast is None else fast.read_bytes(key)
        if encoded is False:
            return default
        try:
            return loads(encoded or self._one_key.read_bytes(key, encode_key(key)))
        except KeyNotFoundError:
            return default
        except JSONDecodeError:
            return self.read(key)  # which raises

    def delete(self, key: str) -> None:
        """Remove `key`.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.delete("user:1")
        >>> "user:1" in store
        False

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
        record, size = self._one_key.delete(key, encode_key(key))
        if self._durable:
            self._file.flush_record(record, size)

    def __delitem__(self, key: str) -> None:
        self.delete(key)

    @overload
    def pop(self, key: str) -> Value: ...
    @overload
    def pop(self, key: str, default: Default) -> Value | Default: ...
    def pop(self, key: str, default: object = _MISSING) -> object:
        """Remove `key` and return its value, in one step: of several threads one gets it.

        `default` stands for an absent key only, not for what cannot be a key. Nothing is removed
        where the value is damaged.

        >>> store.put("job:1", {"url": "https://example.org"})
        >>> store.pop("job:1")
        {'url': 'https://example.org'}
        >>> store.pop("job:1", None) is None
        True

        Raises: as `read` and `delete`.
        """
        fast = None if self._durable else self._fast
        encoded = None if fast is None else fast.pop(key)
        if encoded:
            return decode_value(key, encoded)
        try:
            if encoded is not None:
                raise KeyNotFoundError(key)
            return self._pop(key, encode_key(key))
        except KeyNotFoundError:
            if default is _MISSING:
                raise
            return default

    def _pop(self, key: str, encoded_key: bytes) -> Value:
        while True:
            # No lock is held while the value is verified and parsed; so it is done again if it was
            # replaced.
            encoded, version = self._one_key.read(key, encoded_key)
            value: Value = decode_value(key, encoded)
            record, size = self._one_key.delete(key, encoded_key, version)
            if record >= 0:
                if self._durable:
                    self._file.flush_record(record, size)
                return value

    def popitem(self) -> tuple[str, Value]:
        """Remove some key and return it with its value.

        >>> store.put("job:1", {"url": "https://example.org"})
        >>> store.popitem()
        ('job:1', {'url': 'https://example.org'})

        Raises:
            KeyNotFoundError: the store is empty.
        """
        while (key := self._all_keys.any_key()) is not None:
            with suppress(KeyNotFoundError):  # another thread was faster, or it expired
                return key, self.pop(key)
        raise KeyNotFoundError("any key, for the store is empty")

    def ttl(self, key: str) -> int | None:
        """Return the whole seconds until `key` expires, rounded up; None if it never does.

        Takes one stripe, reads no value, writes nothing.

        >>> store.put("session:1", {"user": "ada"}, ttl=1800)
        >>> store.ttl("session:1")
        1800

        Raises:
            InvalidKeyError: `key` is not a string of 1 to 32 characters.
            KeyNotFoundError: nothing is stored under `key`; an expired record counts as absent.
            CorruptStoreError: its slot and its record do not agree on that; one is damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        found = None if self._fast is None else self._fast.expiry(key)
        if found is None:
            found = self._one_key.expiry(encode_key(key), key)
        if found is True:
            return None
        if found is False:
            raise KeyNotFoundError(key)
        expires_at, now_ms = found
        return -((now_ms - expires_at) // 1000)

    def __contains__(self, key: object) -> bool:
        """Return whether `read` would find `key`; False for what cannot be a key.

        >>> store.put("user:1", {"name": "Ada"})
        >>> "user:1" in store, "user:2" in store
        (True, False)
        """
        found = None if self._fast is None else self._fast.expiry(key)
        if found is not None:
            return bool(found)
        try:
            encoded_key = encode_key(key)
        except InvalidKeyError:
            if self._locks.closed:
                self._locks.raise_closed()
            return False
        return bool(self._one_key.expiry(encoded_key))

    # --- many keys -----------------------------------------------------------------------------

    def get_many(self, keys: Iterable[str]) -> dict[str, Value]:
        """Return a dict of those of `keys` that are there, each with its value as a new dict.

        It has the keys as they were given, in that order. One that is given twice, or is absent,
        is no error. Each value is as it was at some moment during the call.

        Faster than single reads, most so where the store is far larger than the processor's caches:
        keys are taken and looked up up to 32 at a time. Other threads have their turn in between.

        >>> store.put_many({"user:1": {"name": "Ada"}, "user:2": {"name": "Alan"}})
        >>> store.get_many(["user:2", "user:3", "user:1"])
        {'user:2': {'name': 'Alan'}, 'user:1': {'name': 'Ada'}}

        Raises:
            InvalidKeyError: one of `keys` is not a string of 1 to 32 characters.
            CorruptStoreError: the bytes of one in the file are damaged.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        return read_many(self._fast, keys, self.get)

    @overload
    def put_many(self, items: SupportsKeys[Value], ttl: int | None = None) -> None: ...
    @overload
    def put_many(self, items: Iterable[tuple[str, Value]], ttl: int | None = None) -> None: ...
    def put_many(self, items: Items[Value], ttl: int | None = None) -> None:
        """Put each of a mapping or of an iterable of pairs, for `ttl` whole seconds or for ever.

        In their order, each as `put` does, so each by itself is atomic; of a key that is given
        twice the last value stays. With `durable` there is one flush for all, as it ends.

        Where it raises, those before the key that the error names are stored and no other; what an
        iterable gave before it raised is stored as well. With `durable` these are flushed, too, and
        where the flush fails, that is what is raised. Nothing is put that was not taken off `items`
        yet, but up to 32 pairs may be taken before they are put: as they are when they are taken.
        Other threads have their turn in between.

        >>> store.put_many({"user:1": {"name": "Ada"}, "user:2": {"name": "Alan"}}, ttl=3600)
        >>> store.put_many((f"item:{number}", {"number": number}) for number in range(1000))
        >>> len(store), store.ttl("user:2")
        (1002, 3600)

        Raises:
            InvalidKeyError, InvalidTTLError: a key or `ttl` is not what the store takes.
            InvalidValueError: a value would not read back equal.
            ValueTooLargeError: it takes more than 16,384 bytes of JSON.
            StoreFullError: no room, after what had expired was taken back; the key is as it was.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` the flush.
            TypeError, ValueError: one of `items` is no pair.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        written = Written() if self._durable else None
        try:
            put_many(self._fast, pairs_of(items), ttl, written, self._store_unflushed)
        finally:
            self._flush_written(written)

    def _flush_written(self, written: Written | None) -> None:
        """Flush what a durable batch has written, unless this is a child forked amid it."""
        if written and not self._file.owned_by_parent:
            self._file.flush_record(written[0], written.size)

    @overload
    def update(self, other: SupportsKeys[Value], /, **pairs: Value) -> None: ...
    @overload
    def update(self, other: Iterable[tuple[str, Value]] = (), /, **pairs: Value) -> None: ...
    def update(self, other: Items[Value] = (), /, **pairs: Value) -> None:
        """Put all pairs of a mapping, or of an iterable, and those that are given by name.

        As `put_many`, which it raises as well.

        >>> store.update({"user:1": {"name": "Ada"}}, settings={"theme": "dark"})
        >>> sorted(store)
        ['settings', 'user:1']
        """
        self.put_many(chain(pairs_of(other), pairs.items()))

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove `keys`, and return how many of them were there and are now gone.

        In their order; one that is given twice counts once. With `durable` there is one flush for
        all, as it ends. Where it raises, those before the key that the error names are gone and no
        other. Other threads have their turn in between.

        >>> store.put_many({"user:1": {"name": "Ada"}, "user:2": {"name": "Alan"}})
        >>> store.delete_many(["user:2", "user:3"])
        1
        >>> list(store)
        ['user:1']

        Raises:
            InvalidKeyError: one of `keys` is not a string of 1 to 32 characters.
            StoreFullError: a copy-on-write file system has no room to overwrite.
            StoreClosedError: the store is closed, or was opened before a fork.
            OSError: the operating system refused a write, or with `durable` the flush.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        written = Written() if self._durable else None

        def delete(key: str) -> bool:
            try:
                record, size = self._one_key.delete(key, encode_key(key))
            except KeyNotFoundError:
                return False
            if written is not None:
                written.add(record, size)
            return True

        try:
            # With `durable`, the cleared record is noted under its stripe.
            return delete_many(None if self._durable else self._fast, keys, delete)
        finally:
            self._flush_written(written)

    # --- one key, for tools --------------------------------------------------------------------

    def _whole(self, key: str) -> tuple[bytes, int, int]:
        """Return a key's value as JSON, its created_at and its expires_at. Raises as `read`."""
        return self._one_key.read_record(key, encode_key(key), clock.now_ms())

    # --- all keys ------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of keys that `read` would find now, all at one moment.

        Looks at a few bytes of each segment, and into those pages that hold something expired.
        Other operations wait meanwhile: microseconds for each thousand keys, and half a microsecond
        for each that has expired and was not yet taken back; see `purge_expired`.

        >>> store.put_many({"user:1": {"name": "Ada"}, "user:2": {"name": "Alan"}})
        >>> len(store)
        2
        """
        return self._all_keys.count()

    def __bool__(self) -> bool:
        """Return whether any key is there, without counting them.

        >>> bool(store)
        False
        """
        return self._all_keys.any_key() is not None

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, in no order.

        Copies the keys of one segment at a time, up to 1,280, and holds no lock while it yields. A
        key that is there throughout is seen once, whatever other threads do.

        >>> store.put_many({"user:1": {"name": "Ada"}, "item:7": {"price": 12}})
        >>> [key for key in store if key.startswith("user:")]
        ['user:1']

        Raises:
            CorruptStoreError: after all keys that can be told, where damage hides others.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        return self._all_keys.iterate(self)

    def items(self) -> StoreItems[Value]:
        """Return a view of the (key, value) pairs; iterating it is like iterating the keys.

        >>> store.put("user:1", {"name": "Ada"})
        >>> {key: value["name"] for key, value in store.items()}
        {'user:1': 'Ada'}
        """
        return StoreItems(self)

    def values(self) -> StoreValues[Value]:
        """Return a view of the values; iterating it is like iterating the keys.

        >>> store.put_many({"item:7": {"price": 12}, "item:8": {"price": 30}})
        >>> sum(value["price"] for value in store.values())
        42
        """
        return StoreValues(self)

    def clear(self) -> None:
        """Remove all keys; the file becomes as short as a new one.

        In one step, among threads and across a crash. Flushes; other operations wait meanwhile.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.clear()
        >>> len(store)
        0

        Raises:
            StoreClosedError: the store is closed, or was opened before a fork.
            StoreFullError: a copy-on-write file system has no room to overwrite.
            OSError: the operating system refused a write or a flush. What is left then can be read;
                to write, open the store anew.
        """
        self._all_keys.clear()

    def purge_expired(self) -> int:
        """Take back the space of expired records and return their number.

        >>> store.put("session:1", {"user": "ada"}, ttl=1800)
        >>> store.purge_expired()  # half an hour later it would be 1
        0

        Raises:
            StoreClosedError: the store is closed, or was opened before a fork.
            StoreFullError: a copy-on-write file system has no room to overwrite.
        """
        return self._all_keys.purge_expired()

    # --- the store -----------------------------------------------------------------------------

    def compact(self) -> int:
        """Move everything together, cut the file, and return the bytes by which it became shorter.

        What has expired is purged, records of sparse extents move together, segments of the table
        merge. Other threads read and write meanwhile; what they create may leave the file less
        short. Flushes. A crash at any moment loses nothing. Logs its progress now and then.

        >>> store.put_many((f"user:{number}", {"text": "x" * 500}) for number in range(10_000))
        >>> store.delete_many(f"user:{number}" for number in range(9_000))
        9000
        >>> store.compact() > 4_000_000
        True

        Raises:
            StoreBusyError: this thread is making room already, and was interrupted.
            StoreClosedError: the store is closed, or was opened before a fork.
            CorruptStoreError: a page of the table is damaged; then the file is not cut.
            StoreFullError: a copy-on-write file system has no room to overwrite.
            OSError: the operating system refused a write or a flush. Nothing is lost.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        return self._parts.compactor().compact()

    @property
    def path(self) -> Path:
        """The file, as an absolute path.

        >>> store.path.name
        'store.kvs'
        """
        if self._locks.never_opened:
            self._locks.raise_closed()
        return self._path

    @property
    def closed(self) -> bool:
        """Whether the store was closed, or belongs to the parent of this forked process.

        >>> store.close()
        >>> store.closed
        True
        """
        return self._locks.closed

    @operation(flushes=True)
    def sync(self) -> None:
        """Return when everything acknowledged before the call is on stable storage.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.sync()  # from here on power loss cannot undo it

        Raises:
            OSError: the disk did not take it, now or at any time since the store was opened; or the
                file was removed or replaced while it was open.
            StoreClosedError: the store is closed, or was opened before a fork.
        """
        if self._locks.closed:
            self._locks.raise_closed()
        self._file.flush()
        self._file.check_path()

    def stats(self) -> StoreStats:
        """Count what is in the file, all at one moment.

        Looks at 16 bytes of every extent; other operations wait meanwhile.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.stats().records
        1
        """
        return self._all_keys.stats()

    def backup(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
        """Write a copy of the store to another file, and return the number of records in it.

        The copy is a store of its own: compact, verified, on stable storage, mode 0600. It is made
        while other threads go on. Each key is in it as it was at some moment during the call, with
        its value, time of creation and expiry; one that has expired is left out, none else. So
        where a record is damaged, there is no copy; `kvstore-inspect copy` makes one of the rest.

        Until the copy is whole it has another name, beginning with a dot, in the same folder. What
        a killed process has left there, the next backup to the same path removes.

        >>> store.put("user:1", {"name": "Ada"})
        >>> store.backup("backup.kvs")
        1
        >>> with KVStore("backup.kvs") as backup:
        ...     backup.read("user:1")
        {'name': 'Ada'}

        Args:
            path: where the copy is to be, in a folder that is there.
            overwrite: replace a file that is there, in one step. A link is replaced itself.

        Raises:
            FileExistsError: something is at `path`, and `overwrite` is not set; or it is the
                store's own file.
            CorruptStoreError: a record or the index is damaged, of a key that the message names
                where that is known; or the copy does not hold what was written.
            StoreFullError: no room on the disk.
            StoreClosedError: the store is closed, was opened before a fork, or is closed meanwhile.
            OSError: what else the operating system said. Whatever is raised, `path` is as it was,
                unless its folder alone could not be flushed.
        """
        from .backup import logged, new_copy, records_of  # rarely needed

        if self._locks.closed:
            self._locks.raise_closed()
        out = str(resolve(os.fspath(path)))
        source = str(self._path)
        with new_copy(out, source=source, overwrite=overwrite) as copy:
            copy.write(records_of(self._parts, clock.now_ms, logged(source, out)))
            copy.verify(lambda _done, _whole: None)
        return copy.count

    def close(self) -> None:
        """Flush, let go of the file, and refuse all use from now on. A second call does nothing.

        Runs by itself at the end of a `with` block and when the interpreter exits. Called by a
        signal handler, a finalizer or a trace function amid an operation of this very thread, it
        returns at once, and the store is closed as soon as that operation has ended; what goes
        wrong then is reported to `sys.excepthook`.

        >>> store.close()
        >>> store.read("user:1")
        Traceback (most recent call last):
            ...
        kvstore.errors.StoreClosedError: ...

        Raises:
            OSError: a flush failed, or the file was removed or replaced; it is closed all the same.
        """
        if self._locks.never_opened:
            return
        if not self._locks.closed and self._file.owned_by_parent:
            # Here before `_detach_after_fork`: collected as garbage, or closed by a function that
            # the program had registered to run in forked children before it imported this package.
            self._detach_after_fork()
        if self._parts.have_let_go():
            return
        if is_inside() and self._locks.is_busy_here():
            close_at_end(self)
            return
        try:
            self._parts.reclaim()
        finally:
            try:
                with thread.inside:
                    self._parts.close()
            finally:
                if waiting:
                    leave()

    def _detach_after_fork(self) -> None:
        """In a forked child: become a closed store without touching anything of the parent's."""
        self._parts.detach_after_fork()

    def __enter__(self) -> Self:
        if self._locks.closed:
            self._locks.raise_closed()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._locks.closed:
            self.close()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"{self!r}: a store cannot be copied or pickled, for it is an open file; keep its path "
            f"instead, or share the store itself between threads"
        )

    def __repr__(self) -> str:
        if self._locks.never_opened:
            return "<KVStore, not opened>"
        state = "closed" if self._locks.closed else "open"
        return f"<KVStore {str(self._path)!r}, {state}>"

    # A store is equal to itself only: comparing contents would read all of two files.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@atexit.register
def _close_all() -> None:
    for store in list(_stores):
        close_reporting(store)


def _reset_all_locks_after_fork() -> None:
    # A closed store too, which no lock on its file names: it takes a stripe to say that it is.
    for store in list(_stores):
        store._locks.reset_after_fork()


system.at_fork(after_in_child=_reset_all_locks_after_fork)
