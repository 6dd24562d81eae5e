"""Engines on SQLite or on a part of it: statements, or a library that has a time to live."""

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Lock, RLock
from typing import Any, Final

import orjson

from engines.batches import TransactionBatches
from engines.record import expiry_of, now

_PUT: Final = (
    "INSERT INTO record VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
    "SET value = excluded.value, expires_at = excluded.expires_at"
)
_DELETE: Final = "DELETE FROM record WHERE key = ? AND (expires_at = 0 OR expires_at > ?)"


class SqliteEngine:
    """sqlite3 of the standard library: WAL, synchronous=OFF, a table WITHOUT ROWID.

    The connection commits each statement by itself and may be used by any thread, one at a time.

    Args:
        directory: where the file is, or is to be.
        durable: synchronous=FULL.
        tuned: keep the file to this process permanently, which spares SQLite some system calls a
            statement; use a map, and an ordinary table. SQLite advises against WITHOUT ROWID where
            rows are larger than a twentieth of a page, 200 bytes: at 1,000 bytes `create` takes
            half the time without it, at 100 bytes `delete` takes half as long again. The fastest of
            the settings tried: pages of 4, 8 and 16 KiB, caches of 2 to 256 MiB (a large one made
            `create` of 1,000 bytes up to four times slower), with and without a map.
    """

    def __init__(self, directory: Path, *, durable: bool = False, tuned: bool = False) -> None:
        self._lock = Lock()
        self._connection = sqlite3.connect(
            directory / "store.sqlite", isolation_level=None, check_same_thread=False
        )
        settings = ["journal_mode = WAL", f"synchronous = {'FULL' if durable else 'OFF'}"]
        if tuned:
            settings = ["locking_mode = EXCLUSIVE", *settings, "mmap_size = 1073741824"]
        for setting in settings:
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value BLOB NOT NULL, "
            f"expires_at INTEGER NOT NULL) {'' if tuned else 'WITHOUT ROWID'}"
        )
        self._execute = self._connection.execute

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Insert the record; where the key is there, take the place of an expired one."""
        encoded = orjson.dumps(value)
        expires_at = expiry_of(ttl)
        with self._lock:
            try:
                self._execute("INSERT INTO record VALUES (?, ?, ?)", (key, encoded, expires_at))
            except sqlite3.IntegrityError:
                changed = self._execute(
                    "UPDATE record SET value = ?, expires_at = ? WHERE key = ? "
                    "AND expires_at != 0 AND expires_at <= ?",
                    (encoded, expires_at, key, now()),
                ).rowcount
                if not changed:
                    raise ValueError(f"{key!r} exists") from None

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        record = (key, orjson.dumps(value), expiry_of(ttl))
        with self._lock:
            self._execute(_PUT, record)

    def touch(self, key: str, ttl: int | None) -> None:
        with self._lock:
            changed = self._execute(
                "UPDATE record SET expires_at = ? "
                "WHERE key = ? AND (expires_at = 0 OR expires_at > ?)",
                (expiry_of(ttl), key, now()),
            ).rowcount
        if not changed:
            raise KeyError(key)

    def read(self, key: str) -> dict[str, Any]:
        with self._lock:
            row = self._execute(
                "SELECT value, expires_at FROM record WHERE key = ?", (key,)
            ).fetchone()
        if row is None or (row[1] and row[1] <= now()):
            raise KeyError(key)
        value: dict[str, Any] = orjson.loads(row[0])
        return value

    def delete(self, key: str) -> None:
        with self._lock:
            changed = self._execute(_DELETE, (key, now())).rowcount
        if not changed:
            raise KeyError(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        keys = list(keys)
        query = f"SELECT * FROM record WHERE key IN ({', '.join('?' * len(keys))})"
        with self._lock:
            rows = self._execute(query, keys).fetchall()
        then = now()
        return {key: orjson.loads(text) for key, text, end in rows if not end or end > then}

    def put_many(self, items: Mapping[str, dict[str, Any]], ttl: int | None) -> None:
        expires_at = expiry_of(ttl)
        records = [(key, orjson.dumps(value), expires_at) for key, value in items.items()]
        self._execute_many(_PUT, records)

    def delete_many(self, keys: Iterable[str]) -> int:
        then = now()
        return self._execute_many(_DELETE, [(key, then) for key in keys])

    def _execute_many(self, statement: str, records: list[tuple[Any, ...]]) -> int:
        """Execute the statement for each of some records in one transaction; return the changes."""
        with self._lock:
            self._execute("BEGIN")
            changed = self._connection.executemany(statement, records).rowcount
            self._execute("COMMIT")
        return changed

    def close(self) -> None:
        self._connection.close()


class DiskcacheEngine(TransactionBatches):
    """diskcache, with its own `add` and its own expiry, and nothing ever evicted.

    Each thread has a connection of its own, and SQLite has them wait for each other. Of its
    defaults (WAL, a map of 64 MiB, a cache of 8,192 pages) three are changed, as it documents them:
    no eviction, no search for something expired in each `add`, and synchronous=OFF (`durable`:
    FULL).
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        from diskcache import Cache

        self._cache = Cache(
            str(directory / "store.diskcache"),
            eviction_policy="none",
            cull_limit=0,
            sqlite_synchronous=2 if durable else 0,
        )

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Add the record; an expired one is as absent."""
        if not self._cache.add(key, orjson.dumps(value), expire=ttl):
            raise ValueError(f"{key!r} exists")

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        self._cache.set(key, orjson.dumps(value), expire=ttl)

    def touch(self, key: str, ttl: int | None) -> None:
        if not self._cache.touch(key, expire=ttl):
            raise KeyError(key)

    def read(self, key: str) -> dict[str, Any]:
        encoded = self._cache.get(key)
        if encoded is None:
            raise KeyError(key)
        value: dict[str, Any] = orjson.loads(encoded)
        return value

    def delete(self, key: str) -> None:
        del self._cache[key]

    def transact(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._cache.transact()
        return context

    def __len__(self) -> int:
        return len(self._cache)

    def close(self) -> None:
        self._cache.close()


class _Plain:
    """The serializer of what is bytes already, as pysciqlop-cache wants one."""

    name = "plain"
    dumps = bytes
    loads = bytes


class PysciqlopEngine(DiskcacheEngine):
    """pysciqlop-cache, with its own expiry, which is in whole seconds; used like diskcache.

    It has no settings for durability: its SQLite is `synchronous=NORMAL`. Its `add` and `delete`
    take what has expired and was not yet taken back for live.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        from pysciqlop_cache import Cache

        if durable:
            raise ValueError(f"{directory}: not offered, pysciqlop-cache flushes at checkpoints")
        self._cache = Cache(str(directory / "store.sciqlop"), serializer=_Plain())

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Add the record; where the key is there, take the place of an expired one."""
        encoded = orjson.dumps(value)
        if not self._cache.add(key, encoded, expire=ttl):
            with self.transact():
                if key in self._cache:
                    raise ValueError(f"{key!r} exists")
                self._cache.set(key, encoded, expire=ttl)

    def delete(self, key: str) -> None:
        if self._cache.pop(key) is None:
            raise KeyError(key)


class SnkvEngine(TransactionBatches):
    """SNKV: the B-tree of SQLite without its SQL, with its own expiry, in an index of its own.

    A store is for one thread at a time. WAL, moved to the file every 1,000 pages as by SQLite, for
    by default it grows forever; SYNC_OFF (`durable`: SYNC_FULL). It has no `touch`, and of what it
    deletes it does not say that it had expired.
    """

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        import snkv

        self._lock = RLock()
        self._store = snkv.KVStore(
            str(directory / "store.snkv"),
            sync_level=snkv.SYNC_FULL if durable else snkv.SYNC_OFF,
            wal_size_limit=1000,
        )

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Put the record if there is none; an expired one is as absent."""
        encoded = orjson.dumps(value)
        with self._lock:
            if not self._store.put_if_absent(key.encode(), encoded, ttl):
                raise ValueError(f"{key!r} exists")

    def read(self, key: str) -> dict[str, Any]:
        with self._lock:
            encoded = self._store.get(key.encode())
        if encoded is None:
            raise KeyError(key)
        value: dict[str, Any] = orjson.loads(encoded)
        return value

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        encoded = orjson.dumps(value)
        with self._lock:
            self._store.put(key.encode(), encoded, ttl)

    def touch(self, key: str, ttl: int | None) -> None:
        name = key.encode()
        with self._lock:
            encoded = self._store.get(name)
            if encoded is None:
                raise KeyError(key)
            self._store.put(name, encoded, ttl)

    def delete(self, key: str) -> None:
        name = key.encode()
        with self._lock:
            if self._store.ttl(name) == 0:
                raise KeyError(key)
            self._store.delete(name)

    @contextmanager
    def transact(self) -> Iterator[None]:
        with self._lock:
            self._store.begin(write=True)
            yield
            self._store.commit()

    def __len__(self) -> int:
        count: int = self._store.count()
        return count

    def close(self) -> None:
        self._store.close()
