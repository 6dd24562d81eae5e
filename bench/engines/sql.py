"""Engines on SQLite: one statement decides whether the key is there, and changes it."""

import sqlite3
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from engines.record import expiry_of, now


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
            self._execute(
                "INSERT INTO record VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
                "SET value = excluded.value, expires_at = excluded.expires_at",
                record,
            )

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
            changed = self._execute(
                "DELETE FROM record WHERE key = ? AND (expires_at = 0 OR expires_at > ?)",
                (key, now()),
            ).rowcount
        if not changed:
            raise KeyError(key)

    def close(self) -> None:
        self._connection.close()


class DiskcacheEngine:
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

    def close(self) -> None:
        self._cache.close()
