"""The operations on many keys, as loops over those on one key.

Nothing is held from one key to the next, nor from one group of them to the next where the store's
fast path takes them by groups. What that does not do is done by the functions that it is given,
which are those of the operations on one key.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from orjson import loads

from .errors import KVStoreError, StoreFullError
from .format.codec import JSONObject, Value

if TYPE_CHECKING:
    from .compiled.interface import FastPath

_NOWHERE: Final = 2**64 - 1

_Given_co = TypeVar("_Given_co", covariant=True)


class SupportsKeys(Protocol[_Given_co]):
    """What `dict.update` takes for a mapping."""

    def keys(self) -> Iterable[str]:
        """Return the keys."""

    def __getitem__(self, key: str, /) -> _Given_co: ...


Items = SupportsKeys[Value] | Iterable[tuple[str, Value]]
"""What `dict.update` takes."""


class Written(list[int]):
    """From and to where in the file a batch has written: what its one flush is about.

    A list, for code in C extends it as well.
    """

    def __init__(self) -> None:
        super().__init__((_NOWHERE, 0))

    def add(self, offset: int, size: int) -> None:
        """Extend it by the `size` bytes at `offset`."""
        self[:] = min(self[0], offset), max(self[1], offset + size)  # in one step

    def __bool__(self) -> bool:
        """Return whether anything was written."""
        return self[0] != _NOWHERE

    @property
    def size(self) -> int:
        """Bytes from its start to its end."""
        return self[1] - self[0]


def pairs_of(items: Items[Value]) -> Iterator[tuple[str, Value]]:
    """Return the pairs that are meant by what `dict.update` takes."""
    if isinstance(items, Mapping):
        return iter(items.items())
    if hasattr(items, "keys"):
        of_key = cast("SupportsKeys[Value]", items)
        return ((key, of_key[key]) for key in of_key.keys())  # noqa: SIM118 - it need not iterate
    return iter(items)


def read_many(
    fast: "FastPath | None", keys: Iterable[str], get: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Return the values of those keys that are there; `get` gives that of one, or a default."""
    found: dict[str, JSONObject] = {}
    absent = object()

    def read(key: str) -> None:
        value = get(key, absent)
        if value is not absent:
            found[key] = value

    left = iter(keys)
    if fast is None:
        for key in left:
            read(key)
    else:
        while fast.read_many(left, found, loads, read):
            pass
    return found


def put_many(
    fast: "FastPath | None",
    pairs: Iterator[tuple[str, Value]],
    ttl: int | None,
    written: Written | None,
    store: Callable[[str, Value, int | None, bytes | None], tuple[int, int]],
) -> None:
    """Put the pairs in order; `store` puts one and returns offset and size of its record.

    `written` is extended by each, if what is written is of interest.
    """

    def put(pair: tuple[Any, Any], encoded: bytes | None = None) -> None:
        key, value = pair
        try:
            offset, size = store(key, value, ttl, encoded)
        except (KVStoreError, OSError) as error:
            _name_key(error, key, "put")
            raise
        if written is not None:
            written.add(offset, size)

    if fast is None:
        for pair in pairs:
            put(pair)
    else:
        of_fast_path = Written() if written is None else written
        while fast.put_many(pairs, ttl, of_fast_path, put):
            pass


def _name_key(error: Exception, key: object, done: str) -> None:
    """Have an error say which key it was for which something could not be `done`."""
    if str(error).startswith("key "):
        return
    if isinstance(error, StoreFullError):
        error.args = (f"key {key!r}: {error}",)
    else:
        error.add_note(f"key {key!r} was not {done}; those before it were")


def delete_many(fast: "FastPath | None", keys: Iterable[str], delete: Callable[[str], bool]) -> int:
    """Delete the keys in order; return how many `delete`, which deletes one, says were there."""

    def delete_naming(key: str) -> bool:
        try:
            return delete(key)
        except (KVStoreError, OSError) as error:
            _name_key(error, key, "deleted")
            raise

    left = iter(keys)
    if fast is None:
        return sum(map(delete_naming, left))
    deleted, goes_on = 0, True
    while goes_on:
        count, goes_on = fast.delete_many(left, delete_naming)
        deleted += count
    return deleted
