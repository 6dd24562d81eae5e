"""Keys, values and times-to-live that a store refuses, or takes only because they read back equal.

All of them travel between processes as pickles, and have a `repr` without an address.
"""

import math
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, IntEnum, StrEnum
from fractions import Fraction
from typing import Any, Final
from uuid import UUID

from .values import nested, sized_value


class Thing:
    """An object of no use, whose `repr` is the same in each process."""

    def __repr__(self) -> str:
        return "<a thing>"


class Shy:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


class Text(str):
    """A string, and no less."""

    __slots__ = ()


class Lengthy(str):
    """A string that tells another length than it has."""

    __slots__ = ()

    def __len__(self) -> int:
        return 3

    def encode(self, *_: object, **__: object) -> bytes:
        return b"another"


class Unlike(str):
    """A string that is equal to none."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Whole(int):
    """An integer, and no less."""


class Liar(int):
    """An integer that tells another number where it is asked for one."""

    def __int__(self) -> int:
        return -5

    def __mul__(self, other: object) -> int:
        return 2**70

    __rmul__ = __mul__


class Pliant(int):
    """An integer that is in every range."""

    def __ge__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __lt__ = __ge__


class Real(float):
    """A float, and no less."""


class Mapped(dict[Any, Any]):
    """A dict, and no less."""


class Empty(dict[Any, Any]):
    """A dict that shows nothing of what it holds."""

    def values(self) -> Any:
        return ()

    def items(self) -> Any:
        return ()


class Row(list[Any]):
    """A list, and no less."""


class Pair(tuple[Any, ...]):
    """A tuple, and no less."""

    __slots__ = ()


class Level(IntEnum):
    LOW = 1


class Name(StrEnum):
    ADA = "Ada"


class Colour(Enum):
    RED = 1


@dataclass
class Point:
    x: int = 1


Spot = namedtuple("Spot", "x y")


def _itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


MEMBERS: Final[tuple[Any, ...]] = (
    *(math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308, 0.1),
    *(2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**100, 10**5000, True, False, None),
    *("\ud800", "a\udfff", "\0", "🐍", "\U0010ffff", "\ufeff", "", "é" * 300),
    *(Text("a"), Text("\udc80"), Lengthy("abcdef"), Unlike("a"), Name.ADA, Level.LOW, Colour.RED),
    *(Whole(7), Whole(2**64), Liar(7), Pliant(7), Real(1.5), Real(math.nan)),
    *(Mapped(a=1), Empty(a=1), OrderedDict(a=1), defaultdict(int, a=1), Row([1]), Pair((1,))),
    *(Spot(1, 2), Point(), datetime(2020, 1, 1), UUID(int=1), Fraction(1, 3), 1j, b"", bytearray()),
    *({1}, frozenset(), range(3), Thing(), Shy(), len, int, Ellipsis, (), [], {}, (1, (2, [3]))),
    *([math.nan], {"deep": [{"deeper": (1, math.nan)}]}, {"a": {1: 2}}, [{"b": [b""]}]),
    *({1: 2}, {None: 1}, {Text("k"): 1}, {Unlike("k"): 1, "k": 2}, {Name.ADA: 1}, {"\ud800": 1}),
)

VALUES: Final[tuple[Any, ...]] = (
    *(None, 1, "{}", [], [("a", 1)], (), b"{}", Thing(), Shy(), dict, True, math.nan),
    *({1: 2}, {None: 1}, {True: 1}, {1.5: 1}, {("a",): 1}, {b"a": 1}, {"a": 1, 1: "a"}),
    *(Mapped(a=1), Empty(a=1), OrderedDict(a=1), defaultdict(int, a=1), {Text("k"): 1}),
    *({Unlike("k"): 1, "k": 2}, {"\ud800": 1}, {"": ""}, {"\0": "\0"}, _itself()),
    *(nested(depth, kind) for depth in (99, 100, 101, 102) for kind in (dict, list, tuple)),
    *(sized_value(size) for size in (2, 12, 16_383, 16_384, 16_385, 60_000)),
    {"é" * 8_190: 1},
    {"": "é" * 8_189},
    {"": "é" * 8_190},
    {str(number): number for number in range(1_200)},
    {"many": [[]] * 3_000},
)

TTLS: Final[tuple[Any, ...]] = (
    *(0, -1, 1, 10**10, 10**10 + 1, 2**63, 2**64, 2**64 + 1, -(2**63) - 1, 10**300, True, False),
    *(1.0, 0.5, math.nan, "1", b"1", [], Fraction(1), 1j, Thing(), Shy()),
    *(Whole(5), Whole(0), Liar(5), Pliant(5), Pliant(2**70), Pliant(-5), Level.LOW),
)
