"""Engines that cannot put a record only where there is none: a lock is held while they look.

They may be read by several threads at a time without it, semidbm excepted. Those that may be
written by several threads too have a lock for each of some keys, so that threads can share flushes.
What they hold may be read after the death of the process, but for what is said of `dict`, unqlite
and babeldb.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Final

import orjson

from engines.batches import Bulk, BytesBatches
from engines.record import BytesEngine, decode, encode, expiry_of, has_expired, now, renew

_CACHE_MIB: Final = 64
_STRIPES: Final = 64  # locks of what several threads may write

NewBatch = Callable[[], AbstractContextManager[Any]]  # that is written when it ends


class DictEngine:
    """A dict of JSON and expiry under a lock: what any store could hope for. Keeps nothing."""

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        if durable:
            raise ValueError(f"a dict keeps nothing in {directory}, so it cannot be durable")
        self._lock = Lock()
        self._records: dict[str, tuple[int, bytes]] = {}

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Insert the record; where the key is there, take the place of an expired one."""
        # A copy: what orjson returns holds on to the 4 KiB that it was written to.
        encoded = bytes(memoryview(orjson.dumps(value)))
        expires_at = expiry_of(ttl)
        with self._lock:
            found = self._records.get(key)
            if found is not None and not self._expired(found):
                raise ValueError(f"{key!r} exists")
            self._records[key] = expires_at, encoded

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        encoded = bytes(memoryview(orjson.dumps(value)))
        expires_at = expiry_of(ttl)
        with self._lock:
            self._records[key] = expires_at, encoded

    def touch(self, key: str, ttl: int | None) -> None:
        expires_at = expiry_of(ttl)
        with self._lock:
            found = self._records.get(key)
            if found is None or self._expired(found):
                raise KeyError(key)
            self._records[key] = expires_at, found[1]

    def read(self, key: str) -> dict[str, Any]:
        with self._lock:
            found = self._records.get(key)
        if found is None or self._expired(found):
            raise KeyError(key)
        value: dict[str, Any] = orjson.loads(found[1])
        return value

    def delete(self, key: str) -> None:
        """Delete the record; an expired one is taken away too, but was absent."""
        with self._lock:
            found = self._records.pop(key, None)
        if found is None or self._expired(found):
            raise KeyError(key)

    def close(self) -> None:
        self._records.clear()

    def _expired(self, found: tuple[int, bytes]) -> bool:
        return 0 < found[0] <= now()


class LockedEngine(BytesEngine, BytesBatches):
    """A store of bytes under bytes that can get (None where there is nothing), put and remove.

    Args:
        get: return what is there.
        put: put a record, whatever there is.
        remove: remove a record that is there.
        close: close the store.
        bulk: the same of many.
        locks: how many there are: one where one thread at a time may write.
    """

    def __init__(
        self,
        get: Callable[[bytes], bytes | None],
        put: Callable[[bytes, bytes], object],
        remove: Callable[[bytes], object],
        close: Callable[[], object],
        bulk: Bulk | None = None,
        locks: int = 1,
    ) -> None:
        super().__init__(get, close)
        if bulk is not None:
            self._bulk = bulk
        self._locks = [Lock() for _ in range(locks)]
        self._put = put
        self._remove = remove

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Put the record if there is none, or an expired one."""
        name = key.encode()
        stored = encode(value, ttl)
        with self._locks[hash(name) % len(self._locks)]:
            found = self._get(name)
            if found is not None and not has_expired(found):
                raise ValueError(f"{key!r} exists")
            self._put(name, stored)

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        name = key.encode()
        stored = encode(value, ttl)
        with self._locks[hash(name) % len(self._locks)]:
            self._put(name, stored)

    def touch(self, key: str, ttl: int | None) -> None:
        name = key.encode()
        with self._locks[hash(name) % len(self._locks)]:
            self._put(name, renew(key, self._get(name), ttl))

    def delete(self, key: str) -> None:
        """Remove the record; an expired one is taken away too, but was absent."""
        name = key.encode()
        with self._locks[hash(name) % len(self._locks)]:
            found = self._get(name)
            if found is None:
                raise KeyError(key)
            self._remove(name)
        if has_expired(found):
            raise KeyError(key)


class LockedReadsEngine(LockedEngine):
    """One whose reads move the position in a file that all threads share."""

    def read(self, key: str) -> dict[str, Any]:
        name = key.encode()
        with self._locks[hash(name) % len(self._locks)]:
            found = self._get(name)
        return decode(key, found)


def open_rocksdict(directory: Path, *, durable: bool = False) -> LockedEngine:
    """RocksDB by rocksdict, in raw mode (bytes), with its log as by default: written, not flushed.

    `optimize_for_point_lookup` is what RocksDB has for stores without iteration: Bloom filters, an
    index by hash in each block, and a cache, here of 64 MiB. Blocks are compressed by Snappy, as by
    default. `durable`: the log is flushed.
    """
    from rocksdict import Options, Rdict, WriteBatch, WriteOptions

    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.optimize_for_point_lookup(_CACHE_MIB)
    store: Any = Rdict(str(directory / "store.rocksdb"), options)
    writing = WriteOptions()
    writing.sync = durable
    store.set_write_options(writing)

    @contextmanager
    def new_batch() -> Iterator[Any]:
        batch = WriteBatch(raw_mode=True)
        yield batch
        store.write(batch, writing)

    def get_bulk(names: list[bytes]) -> Iterable[tuple[bytes, bytes]]:
        found = zip(names, store.get(names), strict=True)
        return [(name, stored) for name, stored in found if stored is not None]

    bulk = Bulk(get_bulk, partial(_put_each, new_batch), partial(_remove_each, new_batch))
    return LockedEngine(store.get, store.put, store.delete, store.close, bulk, _STRIPES)


def open_plyvel(directory: Path, *, durable: bool = False) -> LockedEngine:
    """LevelDB by plyvel, with its log as by default: written, not flushed.

    With Bloom filters of 10 bits a key, as LevelDB recommends them for random reads, and with a
    cache and a write buffer as large as those of RocksDB here: 64 MiB. Blocks are compressed by
    Snappy, as by default. `durable`: the log is flushed.
    """
    import plyvel

    store = plyvel.DB(
        str(directory / "store.leveldb"),
        create_if_missing=True,
        bloom_filter_bits=10,
        lru_cache_size=_CACHE_MIB << 20,
        write_buffer_size=_CACHE_MIB << 20,
    )

    new_batch = partial(store.write_batch, sync=durable)
    return LockedEngine(
        store.get,
        partial(store.put, sync=True) if durable else store.put,
        partial(store.delete, sync=True) if durable else store.delete,
        store.close,
        Bulk(
            partial(_get_each, store.get),
            partial(_put_each, new_batch),
            partial(_remove_each, new_batch),
        ),
        _STRIPES,
    )


def _get_each(
    get: Callable[[bytes], bytes | None], names: list[bytes]
) -> Iterable[tuple[bytes, bytes]]:
    """Get one after the other, where a store has nothing else."""
    return [(name, stored) for name in names if (stored := get(name)) is not None]


def _put_each(new_batch: NewBatch, records: list[tuple[bytes, bytes]]) -> None:
    with new_batch() as batch:
        for name, stored in records:
            batch.put(name, stored)


def _remove_each(new_batch: NewBatch, names: list[bytes]) -> None:
    with new_batch() as batch:
        for name in names:
            batch.delete(name)


def open_babeldb(directory: Path, *, durable: bool = False) -> LockedEngine:
    """BabelDB: an LSM tree behind a log. Buffered: written and flushed ten times a second.

    So a tenth of a second is lost if the process dies; a batch is flushed in any case. It can put a
    record only where there is none, which takes longer than to look first. `durable`: immediate, as
    by default; threads share flushes.
    """
    import babeldb

    store = babeldb.open(
        directory / "store.babeldb", durability="immediate" if durable else "buffered"
    )
    bulk = Bulk(
        partial(_get_each, store.get),
        lambda records: store.batch([("put", *record) for record in records]),
        lambda names: store.batch([("delete", name) for name in names]),
    )
    return LockedEngine(store.get, store.put, store.delete, store.close, bulk, _STRIPES)


def open_semidbm(directory: Path, *, durable: bool = False) -> LockedEngine:
    """Semidbm: a log in plain Python, and a dict of where in it each key is. Checks no checksum."""
    import semidbm

    if durable:
        raise ValueError(f"{directory}: not offered, semidbm has only a sync() of everything")
    store = semidbm.open(str(directory / "store.semidbm"), "c")

    def get(name: bytes) -> bytes | None:
        # Asked first: an exception raised and caught here takes longer, and is raised once more.
        if name not in store:
            return None
        found: bytes = store[name]
        return found

    return LockedReadsEngine(get, store.__setitem__, store.__delitem__, store.close)


def open_unqlite(directory: Path, *, durable: bool = False) -> LockedEngine:
    """UnQLite, as it is by default: all that is done between open and close is one transaction.

    It is the only way without a flush for each change, and the fastest, but no equal of the others:
    changes are in private memory until the close, and lost if the process dies. `durable`: each
    change is committed. The Python module holds the interpreter's lock in every call.
    """
    from unqlite import UnQLite

    store = UnQLite(str(directory / "store.unqlite"))

    def put(name: bytes, stored: bytes) -> None:
        store.store(name, stored)
        store.commit()

    def remove(name: bytes) -> None:
        store.delete(name)
        store.commit()

    if durable:
        return LockedEngine(store.get, put, remove, store.close)
    return LockedEngine(store.get, store.store, store.delete, store.close)
