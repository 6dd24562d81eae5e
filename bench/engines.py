"""The stores that are compared, each made to do the same work.

`create` fails where the key is there and has not expired, `read` checks the expiry and parses,
`delete` fails where the key is absent; a value is stored with its expiry, in milliseconds since
1970 (0: never). All are used as they should be for speed: SQLite by one cached statement an
operation, LMDB by one short transaction. None waits for the disk.
"""

import sqlite3
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from struct import Struct
from threading import Lock
from time import time_ns
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

import orjson


class Engine(Protocol):
    """What the benchmark asks of a store. An absent key is a KeyError."""

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None: ...  # noqa: D102
    def read(self, key: str) -> dict[str, Any]: ...  # noqa: D102
    def delete(self, key: str) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class SqliteEngine:
    """sqlite3 of the standard library: WAL, synchronous=OFF, a table WITHOUT ROWID.

    The connection commits each statement by itself and may be used by any thread, one at a time.

    Args:
        directory: where the file is, or is to be.
        durable: synchronous=FULL.
        tuned: besides, keep the file to this process for good, which spares SQLite some system
            calls a statement, and use pages of 8 KiB and a map. The fastest of the settings tried:
            pages of 4, 8 and 16 KiB, caches of 2 to 256 MiB (a large one made `create` of 1,000
            bytes up to four times slower), with and without a map.
    """

    def __init__(self, directory: Path, *, durable: bool = False, tuned: bool = False) -> None:
        self._lock = Lock()
        self._connection = sqlite3.connect(
            directory / "store.sqlite", isolation_level=None, check_same_thread=False
        )
        settings = ["journal_mode = WAL", f"synchronous = {'FULL' if durable else 'OFF'}"]
        if tuned:
            settings = [
                "page_size = 8192",
                "locking_mode = EXCLUSIVE",
                *settings,
                "mmap_size = 1073741824",
            ]
        for setting in settings:
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS record (key TEXT PRIMARY KEY, value BLOB NOT NULL, "
            "expires_at INTEGER NOT NULL) WITHOUT ROWID"
        )
        self._execute = self._connection.execute

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Insert the record; where the key is there, take the place of an expired one."""
        encoded = orjson.dumps(value)
        expires_at = time_ns() // 1_000_000 + ttl * 1000 if ttl else 0
        with self._lock:
            try:
                self._execute("INSERT INTO record VALUES (?, ?, ?)", (key, encoded, expires_at))
            except sqlite3.IntegrityError:
                changed = self._execute(
                    "UPDATE record SET value = ?, expires_at = ? WHERE key = ? "
                    "AND expires_at != 0 AND expires_at <= ?",
                    (encoded, expires_at, key, time_ns() // 1_000_000),
                ).rowcount
                if not changed:
                    raise ValueError(f"{key!r} exists") from None

    def read(self, key: str) -> dict[str, Any]:
        """Return the value."""
        with self._lock:
            row = self._execute(
                "SELECT value, expires_at FROM record WHERE key = ?", (key,)
            ).fetchone()
        if row is None or (row[1] and row[1] <= time_ns() // 1_000_000):
            raise KeyError(key)
        value: dict[str, Any] = orjson.loads(row[0])
        return value

    def delete(self, key: str) -> None:
        """Delete the record."""
        with self._lock:
            changed = self._execute(
                "DELETE FROM record WHERE key = ? AND (expires_at = 0 OR expires_at > ?)",
                (key, time_ns() // 1_000_000),
            ).rowcount
        if not changed:
            raise KeyError(key)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class LmdbEngine:
    """py-lmdb with a writable map and no flushes: eight bytes of expiry, then the JSON."""

    _EXPIRY: Final = Struct("<Q")
    _MAP_SIZE: Final = 8 << 30  # address space; the file has holes

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        import lmdb

        self._environment = lmdb.open(
            str(directory / "store.lmdb"),
            map_size=self._MAP_SIZE,
            subdir=False,
            writemap=True,
            sync=durable,
            metasync=durable,
        )
        self._begin = self._environment.begin

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Put the record; where the key is there, take the place of an expired one."""
        expires_at = time_ns() // 1_000_000 + ttl * 1000 if ttl else 0
        name = key.encode()
        stored = self._EXPIRY.pack(expires_at) + orjson.dumps(value)
        with self._begin(write=True) as transaction:
            if not transaction.put(name, stored, overwrite=False):
                if not self._expired(transaction.get(name)):
                    raise ValueError(f"{key!r} exists")
                transaction.put(name, stored)

    def read(self, key: str) -> dict[str, Any]:
        """Return the value."""
        with self._begin(buffers=True) as transaction:
            stored = transaction.get(key.encode())
            if stored is None or self._expired(stored):
                raise KeyError(key)
            value: dict[str, Any] = orjson.loads(stored[8:])
        return value

    def delete(self, key: str) -> None:
        """Delete the record; an expired one is taken away too, but was absent."""
        with self._begin(write=True) as transaction:
            stored = transaction.pop(key.encode())
        if stored is None or self._expired(stored):
            raise KeyError(key)

    def close(self) -> None:
        """Close the file."""
        self._environment.close()

    def _expired(self, stored: Any) -> bool:
        (expires_at,) = self._EXPIRY.unpack_from(stored)
        return bool(expires_at) and bool(expires_at <= time_ns() // 1_000_000)


class DictEngine:
    """A dict of JSON and expiry under a lock: what any store could hope for. Keeps nothing."""

    def __init__(self, directory: Path, *, durable: bool = False) -> None:
        if durable:
            raise ValueError(f"a dict keeps nothing in {directory}, so it cannot be durable")
        self._lock = Lock()
        self._records: dict[str, tuple[int, bytes]] = {}

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Insert the record; where the key is there, take the place of an expired one."""
        encoded = orjson.dumps(value)
        expires_at = time_ns() // 1_000_000 + ttl * 1000 if ttl else 0
        with self._lock:
            found = self._records.get(key)
            if found is not None and not self._expired(found):
                raise ValueError(f"{key!r} exists")
            self._records[key] = expires_at, encoded

    def read(self, key: str) -> dict[str, Any]:
        """Return the value."""
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
        """Forget everything."""
        self._records.clear()

    def _expired(self, found: tuple[int, bytes]) -> bool:
        return 0 < found[0] <= time_ns() // 1_000_000


class OpenEngine(Protocol):
    """Opens a store in a folder of its own, new or as it was left there.

    With `durable`, what was acknowledged is on stable storage.
    """

    def __call__(self, directory: Path, *, durable: bool = False) -> Engine: ...  # noqa: D102


def _open_kvstore(directory: Path, *, durable: bool = False) -> Engine:
    from kvstore import KVStore

    return KVStore(directory / "store.kvs", durable=durable)


class Kind(NamedTuple):
    """What the harness knows of an engine."""

    open: OpenEngine
    module: str
    """What has to be importable."""
    library: str
    """The name under which its version is known."""
    can_be_durable: bool = False
    keeps_a_file: bool = True
    environment: Mapping[str, str] = MappingProxyType({})
    """What the process of this engine is started with."""


ENGINES: Final[dict[str, Kind]] = {
    "kvstore": Kind(_open_kvstore, "kvstore", "kvstore", can_be_durable=True),
    "dict": Kind(DictEngine, "builtins", "python", keeps_a_file=False),
    "sqlite3": Kind(SqliteEngine, "sqlite3", "sqlite", can_be_durable=True),
    "sqlite3-tuned": Kind(
        partial(SqliteEngine, tuned=True), "sqlite3", "sqlite", can_be_durable=True
    ),
    "lmdb": Kind(LmdbEngine, "lmdb", "lmdb", can_be_durable=True),
}


def importable(names: Iterable[str]) -> list[str]:
    """Return those of some engines whose library is installed."""
    return [name for name in names if find_spec(ENGINES[name].module) is not None]
