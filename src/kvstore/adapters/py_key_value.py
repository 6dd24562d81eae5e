"""A store of py-key-value-aio in one file, as FastMCP takes it.

Needs the extra `py-key-value`.

A record is what that library's other stores write: ``{"version": 1, "collection": …, "key": …,
"value": …, "created_at": …, "expires_at": …}``. Its `expires_at` is exact to the microsecond and is
what counts; the store's own time-to-live is up to a second later, and takes the space back.
"""

import os
from asyncio import to_thread
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from math import ceil
from typing import ParamSpec, TypeVar

import orjson

from kvstore import errors
from kvstore.format.codec import MAX_TTL_SECONDS, JSONObject
from kvstore.format.layout import MAX_FILE_SIZE, MAX_VALUE_SIZE

from .records import open_store, record_key, refused

try:
    from key_value.aio.errors import DeserializationError, SerializationError, ValueTooLargeError
    from key_value.aio.stores.base import (
        SEED_DATA_TYPE,
        BaseContextManagerStore,
        BaseCullStore,
        BaseDestroyCollectionStore,
        BaseDestroyStore,
        BaseEnumerateCollectionsStore,
        BaseEnumerateKeysStore,
        ManagedEntry,
    )
except ImportError as error:
    raise ImportError(
        "KVStoreStore needs py-key-value-aio: pip install 'py-key-value-aio>=0.4.6'"
    ) from error

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class KVStoreStore(
    BaseDestroyStore,
    BaseDestroyCollectionStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    BaseCullStore,
    BaseContextManagerStore,
):
    """A store of py-key-value-aio in one file, for a server of one process.

    >>> import asyncio, tempfile
    >>> async def use(path):
    ...     async with KVStoreStore(path) as store:
    ...         await store.put("ada", {"name": "Ada"}, collection="users", ttl=0.5)
    ...         return await store.get("ada", collection="users")
    >>> asyncio.run(use(tempfile.mkdtemp() + "/state.kvs"))
    {'name': 'Ada'}

    In FastMCP it is a `client_storage`, `cache_storage` or `session_state_store`. It encrypts
    nothing: for tokens put that library's `FernetEncryptionWrapper` around it.

    Collections and keys are any strings of UTF-8. A value is JSON, and its record, with collection,
    key and times, takes 16,384 bytes of it at the most: 16,000 for the value where these are short.
    (Where larger ones are not worth an error, `LimitSizeWrapper` leaves them out; FastMCP's
    response cache has it, as `max_item_size`.) A time-to-live is exact, in fractions of a second,
    too.

    Calls take microseconds, and run where they are called, in the event loop. What takes longer
    runs in a thread: changes if `durable`, listing, destroying, culling and closing. `put_many` is
    atomic for each value by itself: where one is refused, those before it are stored.

    `keys`, `collections` and `destroy_collection` read the whole store, and raise where a record is
    damaged, of which nobody knows what it was: ``store.delete`` removes it, under the key that the
    error names. All is listed where no limit is given. `destroy` empties the file.

    Args:
        path: the file, which is the store's alone; it is created where it is missing.
        default_collection: as of every store of that library.
        seed: likewise; put in whenever the store is opened, over what is there.
        max_bytes: the file does not grow past this.
        durable: True: a change returns when it is on stable storage.
        lock_timeout: seconds to wait for another process to let go of the file, as amid a restart.

    Attributes:
        store: the open store, for `backup`, `compact`, `sync` and `stats`.

    Raises:
        StoreLockedError: another process has the file, or this one has it already.
        ValueError, OSError, KVStoreError: as `KVStore`. Its methods raise that library's own
            `ValueTooLargeError`, `SerializationError` for what is not JSON, and
            `DeserializationError` for what is damaged; else as those of `KVStore`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        default_collection: str | None = None,
        seed: SEED_DATA_TYPE | None = None,
        max_bytes: int = MAX_FILE_SIZE,
        durable: bool = False,
        lock_timeout: float = 0.0,
    ) -> None:
        super().__init__(default_collection=default_collection, seed=seed, stable_api=True)
        self._durable = durable
        self.store = open_store(
            path,
            max_bytes=max_bytes,
            durable=durable,
            lock_timeout=lock_timeout,
            user=type(self).__name__,
        )
        self._exit_stack.push_async_callback(to_thread, self.store.close)

    async def close(self) -> None:
        """Close the file; idempotent."""
        await self._ensure_exit_stack_entered()  # it would not be left, had nothing been stored yet
        await super().close()

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        [entry] = self._read(collection, [key])
        return entry

    async def _get_managed_entries(
        self, *, collection: str, keys: Sequence[str]
    ) -> list[ManagedEntry | None]:
        return self._read(collection, keys)

    async def _put_managed_entry(
        self, *, collection: str, key: str, managed_entry: ManagedEntry
    ) -> None:
        await self._change(self._put, collection, [key], [managed_entry])

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,  # noqa: ARG002 - each entry has it
        created_at: datetime,  # noqa: ARG002
        expires_at: datetime | None,  # noqa: ARG002
    ) -> None:
        await self._change(self._put, collection, keys, managed_entries)

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        return await self._change(self._delete, collection, [key]) == 1

    async def _delete_managed_entries(self, *, keys: Sequence[str], collection: str) -> int:
        return await self._change(self._delete, collection, keys)

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        return await to_thread(
            lambda: [record["key"] for record in islice(self._live(collection), limit)]
        )

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        names = await to_thread(lambda: {record["collection"] for record in self._live()})
        return list(islice(names, limit))

    async def _delete_collection(self, *, collection: str) -> bool:
        return await to_thread(self._delete_all, collection) > 0

    async def _delete_store(self) -> bool:
        await to_thread(self.store.clear)
        return True

    async def _cull(self) -> None:
        await to_thread(self.store.purge_expired)

    async def _change(
        self,
        change: Callable[Parameters, Result],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """Do it; in a thread if that waits for the disk."""
        if self._durable:
            return await to_thread(change, *arguments, **options)
        return change(*arguments, **options)

    def _read(self, collection: str, keys: Sequence[str]) -> list[ManagedEntry | None]:
        record_keys = [record_key(collection, key) for key in keys]
        with _librarys_error():
            found = self.store.get_many(record_keys)
        return [
            self._entry(collection, key, found.get(each))
            for key, each in zip(keys, record_keys, strict=True)
        ]

    def _entry(self, collection: str, key: str, record: JSONObject | None) -> ManagedEntry | None:
        if not record or record.get("key") != key or record.get("collection") != collection:
            return None
        return self._serialization_adapter.load_dict(record)

    def _put(self, collection: str, keys: Sequence[str], entries: Sequence[ManagedEntry]) -> None:
        """Put entries that expire at the same time, if at all, in one batch."""
        records = [
            self._serialization_adapter.dump_dict(entry, key=key, collection=collection)
            for key, entry in zip(keys, entries, strict=True)
        ]
        record_keys = [record_key(collection, key) for key in keys]
        ttl = _whole_ttl(entries[0].ttl) if entries else None
        try:
            self.store.put_many(zip(record_keys, records, strict=True), ttl)
        except errors.InvalidValueError:
            for key, record, error in refused(zip(keys, records, strict=True)):
                if isinstance(error, errors.ValueTooLargeError):
                    size = len(orjson.dumps(record, list))  # a named tuple is one to the store
                    raise ValueTooLargeError(size, MAX_VALUE_SIZE, collection, key) from error
                raise SerializationError(str(error), {"collection": collection}) from error
            raise

    def _delete(self, collection: str, keys: Sequence[str]) -> int:
        """Delete the keys; return how many of them had not expired."""
        record_keys = [record_key(collection, key) for key in keys]
        try:
            entries = self._read(collection, keys)
        except DeserializationError:  # a damaged one was there, and is deleted
            return self.store.delete_many(record_keys)
        return self.store.delete_many(
            each
            for each, entry in zip(record_keys, entries, strict=True)
            if entry is not None and not entry.is_expired
        )

    def _delete_all(self, collection: str) -> int:
        return self.store.delete_many(
            [record_key(collection, record["key"]) for record in self._live(collection)]
        )

    def _live(self, collection: str | None = None) -> Iterator[JSONObject]:
        """Yield the records that have not expired: all, or those of one collection."""
        with _librarys_error():
            for each, record in self.store.items():
                names = record.get("collection"), record.get("key")
                if collection not in (None, names[0]) or record_key(*map(str, names)) != each:
                    continue
                if not self._serialization_adapter.load_dict(record).is_expired:
                    yield record


@contextmanager
def _librarys_error() -> Iterator[None]:
    """Have a damaged record be what py-key-value has for it."""
    try:
        yield
    except errors.CorruptStoreError as error:
        raise DeserializationError(str(error)) from error


def _whole_ttl(seconds: float | None) -> int | None:
    """Return the store's time-to-live for what must stay for `seconds`.

    It counts from the millisecond that has begun, so that one is added, and takes whole seconds up
    to 10**10. What must stay longer, the store keeps.
    """
    if seconds is None:
        return None
    whole = max(1, ceil(seconds + 0.001))
    return whole if whole <= MAX_TTL_SECONDS else None
