"""The stores that are compared, each made to do the same work.

`create` fails where the key is there and has not expired, `read` checks the expiry and parses,
`put` stores whatever was there, `touch` gives a value that is there another expiry, `delete` fails
where the key is absent; JSON is made and parsed by orjson. Each may be used by several threads, and
is used as its documentation recommends for speed. None waits for the disk, unless it is asked to be
durable.
"""

import platform
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from engines import own
from engines.atomic import (
    LmdbEngine,
    find_extension,
    load_extension,
    open_kyotocabinet,
    open_tkrzw,
)
from engines.locked import (
    DictEngine,
    open_babeldb,
    open_plyvel,
    open_rocksdict,
    open_semidbm,
    open_unqlite,
)
from engines.sql import DiskcacheEngine, PysciqlopEngine, SnkvEngine, SqliteEngine


class Engine(Protocol):
    """What the benchmark asks of a store. An absent key is a KeyError."""

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None: ...
    def read(self, key: str) -> dict[str, Any]: ...
    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None: ...
    def touch(self, key: str, ttl: int | None) -> None: ...
    def delete(self, key: str) -> None: ...
    def close(self) -> None: ...


class BatchEngine(Engine, Protocol):
    """One that takes many keys at a time, too."""

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]: ...
    def put_many(self, items: Mapping[str, dict[str, Any]], ttl: int | None) -> None: ...
    def delete_many(self, keys: Iterable[str]) -> int: ...


class OpenEngine(Protocol):
    """Opens a store in a folder of its own, new or as it was left there.

    With `durable`, what was acknowledged is on stable storage.
    """

    def __call__(self, directory: Path, *, durable: bool = False) -> Engine: ...


class Kind(NamedTuple):
    """What the harness knows of an engine."""

    open: OpenEngine
    module: str
    """What has to be importable."""
    version: Callable[[], str]
    can_be_durable: bool = False
    keeps_a_file: bool = True
    has_batches: bool = True
    """Whether what it opens is a `BatchEngine`."""
    find: Callable[[str], ModuleSpec | None] = find_spec
    """Finds the module."""
    environment: Mapping[str, str] = MappingProxyType({})
    """What the process of this engine is started with."""
    wanting: str = "not installed (extra `bench`), or without a wheel for this Python"
    """What is said where the module is not to be found."""
    python: str = sys.executable
    """What the process of this engine runs."""

    @property
    def is_own(self) -> bool:
        """Whether this is kvstore."""
        return self.module == "kvstore"


def _installed(package: str) -> Callable[[], str]:
    return lambda: f"{package} {metadata.version(package)}"


def _sqlite_version() -> str:
    return f"SQLite {sqlite3.sqlite_version}"


def _dict_version() -> str:
    return f"dict of Python {platform.python_version()}"


def _tkrzw_version() -> str:
    return f"Tkrzw {load_extension('tkrzw').Utility.VERSION}"


def _kyotocabinet_version() -> str:
    return f"Kyoto Cabinet {load_extension('kyotocabinet').VERSION}"


ENGINES: Final[dict[str, Kind]] = {
    own.COMPILED: Kind(
        own.open_compiled,
        "kvstore",
        partial(own.version_of, own.COMPILED),
        can_be_durable=True,
        find=own.find_compiled,
        environment=own.ENVIRONMENTS[own.COMPILED],
        wanting="its hot path is not compiled here",
    ),
    own.PLAIN: Kind(
        own.open_plain,
        "kvstore",
        partial(own.version_of, own.PLAIN),
        can_be_durable=True,
        environment=own.ENVIRONMENTS[own.PLAIN],
    ),
    "dict": Kind(DictEngine, "builtins", _dict_version, keeps_a_file=False, has_batches=False),
    "sqlite3": Kind(SqliteEngine, "sqlite3", _sqlite_version, can_be_durable=True),
    "sqlite3-tuned": Kind(
        partial(SqliteEngine, tuned=True), "sqlite3", _sqlite_version, can_be_durable=True
    ),
    "lmdb": Kind(LmdbEngine, "lmdb", _installed("lmdb"), can_be_durable=True),
    "diskcache": Kind(DiskcacheEngine, "diskcache", _installed("diskcache"), can_be_durable=True),
    "rocksdict": Kind(open_rocksdict, "rocksdict", _installed("rocksdict"), can_be_durable=True),
    "plyvel": Kind(open_plyvel, "plyvel", _installed("plyvel"), can_be_durable=True),
    "semidbm": Kind(open_semidbm, "semidbm", _installed("semidbm"), has_batches=False),
    "unqlite": Kind(
        open_unqlite, "unqlite", _installed("unqlite"), can_be_durable=True, has_batches=False
    ),
    "snkv": Kind(SnkvEngine, "snkv", _installed("snkv"), can_be_durable=True),
    "pysciqlop-cache": Kind(PysciqlopEngine, "pysciqlop_cache", _installed("pysciqlop-cache")),
    "babeldb": Kind(open_babeldb, "babeldb", _installed("babeldb"), can_be_durable=True),
    "tkrzw": Kind(open_tkrzw, "tkrzw", _tkrzw_version, find=find_extension),
    "kyotocabinet": Kind(
        open_kyotocabinet, "kyotocabinet", _kyotocabinet_version, find=find_extension
    ),
}


def importable(names: Iterable[str]) -> dict[str, Kind]:
    """Return those of some engines whose library is installed."""
    kinds = {name: ENGINES[name] for name in names}
    return {name: kind for name, kind in kinds.items() if kind.find(kind.module) is not None}
