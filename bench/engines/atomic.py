"""Engines that by themselves put a record only where there is none, and are safe from threads."""

from collections.abc import Callable, Iterable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from engines.batches import Bulk, BytesBatches
from engines.record import BytesEngine, decode, encode, has_expired, renew

# As many as the largest experiment stores. A table of hashes needs to be told when it is made.
_RECORDS: Final = 3_000_000
_DEBIAN_PACKAGES: Final = "/usr/lib/python3/dist-packages"


class LmdbEngine(BytesBatches):
    """py-lmdb with a writable map and no flushes: one short transaction an operation."""

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
        self._bulk = Bulk(self._get_bulk, self._put_bulk, self._remove_bulk)

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Put the record; where the key is there, take the place of an expired one."""
        name = key.encode()
        stored = encode(value, ttl)
        with self._begin(write=True) as transaction:
            if not transaction.put(name, stored, overwrite=False):
                if not has_expired(transaction.get(name)):
                    raise ValueError(f"{key!r} exists")
                transaction.put(name, stored)

    def read(self, key: str) -> dict[str, Any]:
        with self._begin(buffers=True) as transaction:
            return decode(key, transaction.get(key.encode()))

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        stored = encode(value, ttl)
        with self._begin(write=True) as transaction:
            transaction.put(key.encode(), stored)

    def touch(self, key: str, ttl: int | None) -> None:
        name = key.encode()
        with self._begin(write=True) as transaction:
            transaction.put(name, renew(key, transaction.get(name), ttl))

    def delete(self, key: str) -> None:
        """Delete the record; an expired one is taken away too, but was absent."""
        with self._begin(write=True) as transaction:
            stored = transaction.pop(key.encode())
        if stored is None or has_expired(stored):
            raise KeyError(key)

    def close(self) -> None:
        self._environment.close()

    def _get_bulk(self, names: list[bytes]) -> Iterable[tuple[bytes, bytes]]:
        with self._begin() as transaction:
            found: list[tuple[bytes, bytes]] = transaction.cursor().getmulti(names)
        return found

    def _put_bulk(self, records: list[tuple[bytes, bytes]]) -> None:
        with self._begin(write=True) as transaction:
            transaction.cursor().putmulti(records)

    def _remove_bulk(self, names: list[bytes]) -> None:
        with self._begin(write=True) as transaction:
            for name in names:
                transaction.delete(name)


class SwappingEngine(BytesEngine, BytesBatches):
    """A store of bytes under bytes whose operations each do all that is needed, atomically.

    Args:
        add: put a record, or return False where there is one.
        put: put a record, whatever there is.
        get: return the record, None where there is none.
        swap: put a record in place of the one given, or return False if there is another.
        pop: remove a record and return it, None where there is none.
        close: close the file.
        bulk: the same of many.
    """

    def __init__(
        self,
        add: Callable[[bytes, bytes], bool],
        put: Callable[[bytes, bytes], object],
        get: Callable[[bytes], bytes | None],
        swap: Callable[[bytes, bytes, bytes], bool],
        pop: Callable[[bytes], bytes | None],
        close: Callable[[], object],
        bulk: Bulk,
    ) -> None:
        super().__init__(get, close)
        self._bulk = bulk
        self._add = add
        self._put = put
        self._swap = swap
        self._pop = pop

    def create(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        """Add the record; where the key is there, take the place of an expired one."""
        name = key.encode()
        stored = encode(value, ttl)
        while not self._add(name, stored):
            found = self._get(name)
            if found is None:
                continue  # it was removed in between
            if not has_expired(found):
                raise ValueError(f"{key!r} exists")
            if self._swap(name, found, stored):
                return

    def put(self, key: str, value: dict[str, Any], ttl: int | None) -> None:
        self._put(key.encode(), encode(value, ttl))

    def touch(self, key: str, ttl: int | None) -> None:
        name = key.encode()
        while (found := self._get(name)) is not None:
            if self._swap(name, found, renew(key, found, ttl)):
                return
        raise KeyError(key)

    def delete(self, key: str) -> None:
        """Remove the record; an expired one is taken away too, but was absent."""
        stored = self._pop(key.encode())
        if stored is None or has_expired(stored):
            raise KeyError(key)


def open_tkrzw(directory: Path, *, durable: bool = False) -> SwappingEngine:
    """HashDBM of Tkrzw, with more buckets than there will be records, as it documents.

    Releases the interpreter's lock in its calls (`concurrent`).
    """
    if durable:
        raise ValueError(f"{directory}: not offered, Tkrzw has only a Synchronize() of everything")
    tkrzw = load_extension("tkrzw")
    status_of = tkrzw.Status
    success, found, missing, other = (
        status_of.SUCCESS,
        status_of.DUPLICATION_ERROR,
        status_of.NOT_FOUND_ERROR,
        status_of.INFEASIBLE_ERROR,
    )
    store = tkrzw.DBM()
    store.Open(
        str(directory / "store.tkh"), True, num_buckets=_RECORDS * 4 // 3, concurrent=True
    ).OrDie()

    def add(name: bytes, stored: bytes) -> bool:
        return succeeded(store.Set(name, stored, False), found)

    def put(name: bytes, stored: bytes) -> None:
        store.Set(name, stored).OrDie()

    def swap(name: bytes, old: bytes, new: bytes) -> bool:
        return succeeded(store.CompareExchange(name, old, new), other)

    def get(name: bytes) -> bytes | None:
        status = status_of()
        stored: bytes | None = store.Get(name, status)
        if stored is None:
            succeeded(status, missing)
        return stored

    def pop(name: bytes) -> bytes | None:
        status, stored = store.RemoveAndGet(name)
        return stored if succeeded(status, missing) else None

    def succeeded(status: Any, otherwise: int) -> bool:
        if status == success:
            return True
        if status != otherwise:
            status.OrDie()
        return False

    bulk = Bulk(
        lambda names: store.GetMulti(*names).items(),
        # Keys are names of arguments.
        lambda records: store.SetMulti(
            True, **{key.decode(): each for key, each in records}
        ).OrDie(),
        lambda names: store.RemoveMulti(*names).OrDie(),
    )
    return SwappingEngine(add, put, get, swap, pop, lambda: store.Close().OrDie(), bulk)


def open_kyotocabinet(directory: Path, *, durable: bool = False) -> SwappingEngine:
    """HashDB of Kyoto Cabinet, tuned as it documents.

    Twice as many buckets as there will be records, and lists instead of trees for the few that
    share one; a map that the file fits into. Releases the interpreter's lock in its calls and
    raises fatal errors (`GCONCURRENT`, `GEXCEPTIONAL`).
    """
    if durable:
        raise ValueError(f"{directory}: not offered, Kyoto Cabinet flushes all of its map")
    library = load_extension("kyotocabinet")
    store = library.DB(library.DB.GCONCURRENT | library.DB.GEXCEPTIONAL)
    path = directory / "store.kch"
    mode = library.DB.OWRITER | library.DB.OCREATE
    if not store.open(f"{path}#bnum={_RECORDS * 2}#opts=l#msiz={1 << 30}", mode):
        raise store.error()
    bulk = Bulk(
        lambda names: store.get_bulk(names, False).items(),
        lambda records: store.set_bulk(dict(records), False),
        lambda names: store.remove_bulk(names, False),
    )
    return SwappingEngine(
        store.add, store.set, store.get, store.cas, store.seize, store.close, bulk
    )


def find_extension(name: str) -> ModuleSpec | None:
    """Find a module that Debian has no PyPI package of: installed here, or Debian's own.

    Debian's is found from a virtual environment too, if made for this version of Python. Its folder
    stays off the path, so that nothing else comes from there.
    """
    debian = FileFinder(_DEBIAN_PACKAGES, (ExtensionFileLoader, EXTENSION_SUFFIXES))
    return find_spec(name) or debian.find_spec(name)


@cache
def load_extension(name: str) -> ModuleType:
    """Return the module that `find_extension` finds."""
    spec = find_extension(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not installed", name=name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
