"""Keys and values as functions of their number, so that every process makes the same ones."""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any, Final

import orjson
from engines import Engine
from workers import Say

KEY_SIZE: Final = 20  # bytes, and characters
WORDS: Final = "words and numbers"
TEXT: Final = "one long string"
SHAPES: Final = (WORDS, TEXT)

_KEY_BITS: Final = KEY_SIZE * 4
_KEY_MASK: Final = (1 << _KEY_BITS) - 1
_KEY_MULTIPLIERS: Final = (0x9E3779B97F4A7C15F39D, 0xC2B2AE3D27D4EB4F1657)  # odd, so it is 1:1
_SMALLEST_VALUE: Final = 80  # bytes
_CHUNK: Final = 1000  # records between two looks at the clock
_DISTINCT_VALUES: Final = 100
_VOCABULARY: Final = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island"),
    *("juniper", "kettle", "lagoon", "meadow", "nectar", "orchard", "prairie", "quartz", "river"),
    *("summit", "timber", "upland", "valley", "willow", "yarrow", "zephyr"),
)
_SHORTEST_WORD: Final = min(map(len, _VOCABULARY))


def key_of(index: int) -> str:
    """Return key number `index`: 20 hexadecimal digits in no order, different for each number."""
    number = index + 1
    for multiplier in _KEY_MULTIPLIERS:
        number = number * multiplier & _KEY_MASK
        number ^= number >> (_KEY_BITS // 2)
    return f"{number:0{KEY_SIZE}x}"


def make_keys(count: int, first: int = 0) -> list[str]:
    """Return the keys number `first` to `first + count - 1`."""
    return [key_of(index) for index in range(first, first + count)]


def make_values(size: int, count: int = 1000, shape: str = WORDS) -> list[dict[str, Any]]:
    """Return different objects, each `size` bytes as compact JSON.

    Args:
        size: in bytes, at least 80.
        count: how many; no more than 2 MB of them are made.
        shape: `WORDS`, as of an application, or `TEXT`, which is cheap to parse.
    """
    if size < _SMALLEST_VALUE:
        raise ValueError(f"values of {size:,} bytes, at least {_SMALLEST_VALUE} are needed")
    rng = random.Random(1)
    return [_make_value(size, shape, rng) for _ in range(min(count, 2_000_000 // size))]


def _make_value(size: int, shape: str, rng: random.Random) -> dict[str, Any]:
    value: dict[str, Any] = {"id": rng.randrange(10**6, 10**7), "note": ""}
    if shape == WORDS:
        value |= {"name": rng.choice(_VOCABULARY), "active": rng.random() < 0.5, "score": 0.5}
    missing = size - len(orjson.dumps(value))
    while shape == WORDS and missing > 160:
        field = f"{rng.choice(_VOCABULARY)}_{len(value)}"
        text = _text(rng.randrange(10, 120), rng)
        member = {field: rng.choice([rng.randrange(10**9), rng.random() < 0.5, text, text])}
        value |= member
        missing -= len(orjson.dumps(member)) - 1  # its braces, less a comma
    value["note"] = _text(missing, rng)
    if len(orjson.dumps(value)) != size:
        raise AssertionError(f"made a value of another size than {size:,} bytes: {value!r}")
    return value


def _text(length: int, rng: random.Random) -> str:
    words = rng.choices(_VOCABULARY, k=length // _SHORTEST_WORD + 1)
    return " ".join(words)[:length]


class Records:
    """Numbered records, so that any process knows what a store should hold by their count alone.

    Args:
        size: of each value, in bytes of compact JSON.
    """

    def __init__(self, size: int) -> None:
        self._values = make_values(size, _DISTINCT_VALUES)

    def value(self, index: int) -> dict[str, Any]:
        """Return the value of record `index`."""
        return self._values[index % len(self._values)]

    def record(self, index: int) -> tuple[str, dict[str, Any], None]:
        """Return what record `index` is created with: key, value, and no time-to-live."""
        return key_of(index), self.value(index), None

    def fill(self, store: Engine, indexes: Iterable[int], seconds: float, say: Say) -> int:
        """Create these records until `seconds` have passed; return how many were created."""
        rest = iter(indexes)
        create, record = store.create, self.record
        done = 0
        end = perf_counter() + seconds
        while perf_counter() < end and (chunk := list(islice(rest, _CHUNK))):
            for index in chunk:
                create(*record(index))
            done += len(chunk)
            say(f"{done:,} records")
        return done

    def outcomes(self, store: Engine, indexes: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Read these records; yield the number of each, and `outcome_of` the read."""
        for index in indexes:
            yield index, outcome_of(partial(store.read, key_of(index)), self.value(index))


def outcome_of(call: Callable[[], object], right: object = None) -> str:
    """Return "right", "wrong" for another result than `right`, "absent", or the error raised.

    An error is the name of its class, with that of the package that it is from.
    """
    try:
        result = call()
    except KeyError:
        return "absent"
    except Exception as error:  # each engine has errors of its own
        kind = type(error)
        package = kind.__module__.partition(".")[0]
        return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"
    return "right" if right is None or result == right else "wrong"
