"""Batches of the engines: by what a store has for many keys, or single calls in one transaction.

They are for one thread: nobody else may write to what a batch writes to meanwhile.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import orjson

from engines.record import decode, expiry_prefix, has_expired


class Bulk(NamedTuple):
    """What a store of bytes under bytes has for many of them; a loop where it has nothing."""

    get: Callable[[list[bytes]], Iterable[tuple[bytes, bytes]]]
    """Return what is there of some keys, each with its key."""
    put: Callable[[list[tuple[bytes, bytes]]], object]
    remove: Callable[[list[bytes]], object]
    """Remove keys that are there."""


class BytesBatches:
    """Batches of an engine of plain bytes."""

    _bulk: Bulk

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        found = self._bulk.get([key.encode() for key in keys])
        return {name.decode(): decode("", each) for name, each in found if not has_expired(each)}

    def put_many(self, items: Mapping[str, dict[str, Any]], ttl: int | None) -> None:
        expiry = expiry_prefix(ttl)
        self._bulk.put([(key.encode(), expiry + orjson.dumps(each)) for key, each in items.items()])

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove what is there; what has expired is taken away too, but not counted."""
        found = list(self._bulk.get([key.encode() for key in keys]))
        self._bulk.remove([name for name, _ in found])
        return sum(not has_expired(stored) for _, stored in found)


class TransactionBatches:
    """Batches of an engine whose single calls can be parts of a transaction."""

    read: Callable[[str], dict[str, Any]]
    put: Callable[[str, dict[str, Any], int | None], None]
    delete: Callable[[str], None]

    def transact(self) -> AbstractContextManager[object]:
        """Begin a transaction that ends with the context."""
        raise NotImplementedError

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        found = {}
        with self.transact():
            for key in keys:
                with suppress(KeyError):
                    found[key] = self.read(key)
        return found

    def put_many(self, items: Mapping[str, dict[str, Any]], ttl: int | None) -> None:
        with self.transact():
            for key, value in items.items():
                self.put(key, value, ttl)

    def delete_many(self, keys: Iterable[str]) -> int:
        removed = 0
        with self.transact():
            for key in keys:
                with suppress(KeyError):
                    self.delete(key)
                    removed += 1
        return removed
