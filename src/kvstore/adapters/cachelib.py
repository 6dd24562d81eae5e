"""A cache of cachelib in one file, as Flask-Session and Flask-Caching take it.

Needs the extra `cachelib`.

A record is ``{"key": …, "value": …}``, the key as it was given and the value as `tagged_json` has
it, or ``{"key": …, "serialized": …}``, the bytes of another serializer in base64.
"""

import logging
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import timedelta
from threading import RLock
from typing import Any, Final, Protocol
from weakref import WeakSet

from kvstore.errors import CorruptStoreError, InvalidValueError, KeyExistsError
from kvstore.file.platform import system
from kvstore.format.codec import MAX_TTL_SECONDS, JSONObject
from kvstore.format.layout import MAX_FILE_SIZE

from .records import open_store, record_key, refused
from .tagged_json import as_json, from_json

try:
    from cachelib import BaseCache
except ImportError as error:
    raise ImportError("KVStoreCache needs cachelib: pip install 'cachelib>=0.17'") from error

_log: Final = logging.getLogger(__name__)
_caches: "WeakSet[KVStoreCache]" = WeakSet()


class Serializer(Protocol):
    """What turns a value into bytes and back, as the classes of `cachelib.serializers` do."""

    def dumps(self, value: Any, /) -> bytes | None:
        """Return `value` as bytes, or None if that cannot be done."""

    def loads(self, serialized: bytes, /) -> Any:
        """Return the value of which `dumps` made these bytes."""


class KVStoreCache(BaseCache):
    """A cache that survives restarts, for a server of one process with any number of threads.

    >>> import tempfile
    >>> cache = KVStoreCache(tempfile.mkdtemp() + "/cache.kvs", default_timeout=60)
    >>> cache.set("user:1", {"name": "Ada", "roles": ("admin",)})
    True
    >>> cache.get("user:1")
    {'name': 'Ada', 'roles': ('admin',)}

    With Flask-Session: ``SESSION_TYPE = "cachelib"``, ``SESSION_CACHELIB = KVStoreCache(path)``.
    With Flask-Caching: ``CACHE_TYPE = "kvstore.adapters.cachelib.KVStoreCache"``, ``CACHE_ARGS =
    [path]``. Each has a file of its own, for `clear` empties the whole of it.

    A key is any string of UTF-8. A value is anything that JSON has, and `bytes`, `tuple`, `set`,
    `frozenset`, `datetime`, `date`, `Decimal`, `UUID`, and dicts with such keys: these come back as
    they were, at any depth. Of a subclass that equals one of JSON's types or a container (`Markup`,
    a named tuple), the plain one comes back; of a time zone, its offset. With its key a value may
    take 16,384 bytes of JSON. All else is refused, and nothing is pickled. Who needs more sets
    `serializer` to an object as those of `cachelib.serializers`, and reading is then as safe as
    that is.

    What goes wrong is raised, and never told as False or None: a session that could not be saved is
    an error. Only a value that cannot be read any more, its bytes being damaged or `serializer`
    another one, is absent as cachelib has it, and logged.

    Of several threads, changes take turns, so that `inc` and `dec` miss none; reads need no turn.

    Args:
        path: the file, which is the cache's alone; it is created where it is missing.
        default_timeout: seconds after which a value is absent where `set` is not told; 0: never.
        ignore_delete_many_errors: what cachelib has it for never happens here.
        max_bytes: the file does not grow past this.
        durable: True: a change returns when it is on stable storage. Each that takes its turn waits
            for a flush of its own; `set_many` has one for all.
        lock_timeout: seconds to wait for another process to let go of the file, as amid a restart.

    Attributes:
        store: the open store, for `backup`, `compact`, `purge_expired`, `sync`, `stats`, `close`.
        serializer: what makes bytes of values; None: they are stored as JSON.

    Raises:
        StoreLockedError: another process has the file, or this one has it already.
        ValueError, OSError, KVStoreError: as `KVStore`.
    """

    serializer: Serializer | None = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        default_timeout: int | timedelta = 300,
        ignore_delete_many_errors: bool = True,
        *,
        max_bytes: int = MAX_FILE_SIZE,
        durable: bool = False,
        lock_timeout: float = 0.0,
    ) -> None:
        super().__init__(default_timeout, ignore_delete_many_errors)
        self._turn = RLock()
        self.store = open_store(
            path,
            max_bytes=max_bytes,
            durable=durable,
            lock_timeout=lock_timeout,
            user=type(self).__name__,
        )
        _caches.add(self)

    def get(self, key: str) -> Any:
        """Return the value of `key`, or None where it is absent, has expired, or is damaged."""
        try:
            return self._value(key, self.store.get(record_key(key)))
        except CorruptStoreError as error:
            _log.warning("cache key %r cannot be read: %s", key, error)
            return None

    def get_many(self, *keys: str) -> list[Any]:
        """Return a list of what `get` returns for each key."""
        record_keys = [record_key(key) for key in keys]
        try:
            found = self.store.get_many(record_keys)
        except CorruptStoreError:
            return super().get_many(*keys)
        return [self._value(*each) for each in zip(keys, map(found.get, record_keys), strict=True)]

    def set(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        """Store `value` under `key`, whatever was there; return True.

        Args:
            key: see the class.
            value: see the class.
            timeout: seconds after which it is absent; 0: never, None: the default. One below 0 has
                passed already.

        Raises:
            InvalidKeyError: the key is no string.
            InvalidValueError: neither JSON nor the tags have this value.
            ValueTooLargeError: it takes more than 16,384 bytes of JSON, with its key.
            StoreFullError, StoreClosedError, OSError: as `KVStore.put`.
        """
        self.set_many({key: value}, timeout)
        return True

    def set_many(
        self, mapping: Mapping[str, Any], timeout: int | timedelta | None = None
    ) -> list[str]:
        """Store each value under its key; return the keys. Raises as `set`, those before stored."""
        seconds = self._normalize_timeout(timeout)
        records = {key: self._record(key, value) for key, value in mapping.items()}
        by_record_key = {record_key(key): record for key, record in records.items()}
        with self._turn:
            if seconds < 0:
                self.store.delete_many(by_record_key)
            else:
                try:
                    self.store.put_many(by_record_key, _ttl(seconds))
                except InvalidValueError:
                    for *_, error in refused(records.items()):
                        raise error from None
                    raise
        return list(mapping)

    def add(self, key: str, value: Any, timeout: int | timedelta | None = None) -> bool:
        """Store `value` under `key` if that is absent; return whether it was. Raises as `set`."""
        seconds = self._normalize_timeout(timeout)
        record = self._record(key, value)
        with self._turn:
            if seconds < 0:
                return not self.has(key)
            try:
                self.store.create(record_key(key), record, _ttl(seconds))
            except KeyExistsError:
                return False
            except InvalidValueError:
                for *_, error in refused([(key, record)]):
                    raise error from None
                raise
        return True

    def has(self, key: str) -> bool:
        """Return whether `key` is there, without reading its value."""
        return record_key(key) in self.store

    def delete(self, key: str) -> bool:
        """Remove `key`; return whether it was there."""
        with self._turn:
            return self.store.delete_many([record_key(key)]) == 1

    def delete_many(self, *keys: str) -> list[str]:
        """Remove the keys; return all of them, for cachelib counts an absent one as deleted."""
        with self._turn:
            self.store.delete_many(map(record_key, keys))
        return list(keys)

    def clear(self) -> bool:
        """Remove everything from the file, which becomes as small as a new one; return True."""
        with self._turn:
            self.store.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> int | None:
        """Add `delta` to the number of `key`, which is 0 where it is absent; return the sum.

        As `set` it, it stays for the default timeout from now on.
        """
        with self._turn:
            return super().inc(key, delta)

    def dec(self, key: str, delta: int = 1) -> int | None:
        """Subtract `delta`: see `inc`."""
        with self._turn:
            return super().dec(key, delta)

    def _record(self, key: str, value: Any) -> JSONObject:
        if self.serializer is not None:
            serialized = self.serializer.dumps(value)
            if serialized is None:
                raise InvalidValueError(
                    f"key {key!r}: {type(self.serializer).__name__} cannot serialize the value, "
                    f"a {type(value).__name__}"
                )
            return {"key": key, "serialized": b64encode(serialized).decode()}
        try:
            return {"key": key, "value": as_json(value)}
        except RecursionError:
            raise InvalidValueError(
                f"key {key!r}: value is nested too deep, or holds itself"
            ) from None

    def _value(self, key: str, record: JSONObject | None) -> Any:
        if record is None or record.get("key") != key:
            return None
        try:
            if "value" in record:
                return from_json(record["value"])
            if self.serializer is not None:
                return self.serializer.loads(b64decode(record["serialized"]))
            raise ValueError("it is of another serializer, and none is set")
        except Exception as error:  # of a serializer, any
            _log.warning("cache key %r cannot be read: %s", key, error)
            return None


def _ttl(seconds: int) -> int | None:
    """Return the store's time-to-live; what it does not take is for ever, as 0 is for cachelib."""
    return seconds if 0 < seconds <= MAX_TTL_SECONDS else None


def _renew_turns_after_fork() -> None:
    # Another thread may have had its turn; without this the child would wait for it, and not learn
    # that the store is its parent's.
    for cache in list(_caches):
        cache._turn = RLock()


system.at_fork(after_in_child=_renew_turns_after_fork)
