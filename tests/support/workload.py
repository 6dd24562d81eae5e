"""Random changes of keys that repeat from their seed, with values that cannot be mixed up.

Every value says which key it belongs to and which operation wrote it, all through its length: a
sector of another value in it, or of an older one of the same key, makes it a value never written.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvstore import KVStore

Value = dict[str, Any]


def make_value(key: str, mark: int, size: int) -> Value:
    """Return a value with `size` bytes of text that only this operation on this key writes."""
    stamp = f"{key}/{mark};".encode()
    text = (stamp * (size // len(stamp) + 1))[:size]
    return {"key": key, "mark": mark, "text": text.decode(errors="ignore")}


def difference(found: dict[str, Value], expected: dict[str, Value]) -> str:
    """Return in words how the contents of a store differ from what is expected."""
    lost = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = sorted(key for key in found.keys() & expected.keys() if found[key] != expected[key])
    return f"lost {lost[:5]}, extra {extra[:5]}, wrong {wrong[:5]}"


def random_size(rng: random.Random) -> int:
    """Return a size for a value: most are small, some fill several pages."""
    return rng.randrange(rng.choice((60, 60, 200, 200, 600, 2_000, 15_000)))


class Operation(NamedTuple):
    """What becomes of a key: a value, or None where it is to be gone; and how, as it is there."""

    key: str
    value: Value | None
    is_there: bool

    def do(self, store: KVStore) -> None:
        """Do it, now by this member, now by that one."""
        key, value, is_there = self
        if value is None:
            store.delete(key)
        elif is_there or value["mark"] % 2:
            store.put(key, value)
        else:
            store.create(key, value)


class Workload:
    """An endless row of operations on a set of keys, the same for the same `rng` and `live`.

    Args:
        rng: what decides.
        live: the values that are there at the beginning. It is not changed.
        prefix: what all the keys begin with.
        population: how many different keys there are.
        grow: the chance of creating where a change of what is there would do as well.
    """

    def __init__(
        self,
        rng: random.Random,
        live: dict[str, Value],
        *,
        prefix: str = "",
        population: int = 400,
        grow: float = 0.3,
        largest: int = 16_000,
    ) -> None:
        self._rng = rng
        self._live = set(live)
        self._marks = rng.getrandbits(32) << 20
        self._prefix = prefix
        self._population = population
        self._grow = grow
        self._largest = largest

    def __iter__(self) -> Iterator[Operation]:
        """Yield operations, each as is fit after those before it."""
        rng = self._rng
        while True:
            key = self._key(rng.randrange(self._population))
            if key in self._live:
                if rng.random() < self._grow and len(self._live) < self._population:
                    continue
                if rng.random() < 0.5:
                    self._live.remove(key)
                    yield Operation(key, None, is_there=True)
                    continue
            is_there = key in self._live
            self._live.add(key)
            self._marks += 1
            value = make_value(key, self._marks, min(random_size(rng), self._largest))
            yield Operation(key, value, is_there)

    def _key(self, number: int) -> str:
        # One in five is longer than the 32 bytes of a slot, and agrees with others in these.
        if number % 5 == 0:
            return f"{self._prefix}{'é' * 16}{number}"
        return f"{self._prefix}{number}"
