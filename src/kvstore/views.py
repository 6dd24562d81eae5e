"""Views of a store's items and values that other threads may change meanwhile.

Those of `collections.abc` would raise for a key deleted between being listed and being read.
"""

from collections.abc import ItemsView, Iterator, Mapping, ValuesView

from .errors import KeyNotFoundError
from .format.codec import Value


class StoreItems(ItemsView[str, Value]):
    """The pairs of a store. Keys deleted while this iterates are left out."""

    _mapping: Mapping[str, Value]

    def __iter__(self) -> Iterator[tuple[str, Value]]:
        for key in self._mapping:
            try:
                value = self._mapping[key]
            except KeyNotFoundError:
                continue
            yield key, value


class StoreValues(ValuesView[Value]):
    """The values of a store. Those deleted while this iterates are left out."""

    _mapping: Mapping[str, Value]

    def __iter__(self) -> Iterator[Value]:
        for item in self._mapping.items():
            yield item[1]

    def __contains__(self, value: object) -> bool:
        return any(value == other for other in self)
