"""A value reads back equal, or is refused: nothing in it is ever changed silently."""

import enum
import json
import math
import types
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import given
from support.stores import OpenStore
from support.values import (
    MAX_DEPTH,
    MAX_VALUE_SIZE,
    identical,
    json_size,
    json_value,
    nested,
    sized_value,
)

from kvstore import InvalidValueError, KVStore, ValueTooLargeError


class Color(enum.Enum):
    RED = 1
    NAMED = "red"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2**63


class Mode(enum.IntFlag):
    READ = 4
    WRITE = 2


class Word(enum.StrEnum):
    YES = "yes"


class Text(str):
    __slots__ = ()


class Number(float):
    __slots__ = ()


class Row(list[Any]):
    pass


class Unequal(int):
    """An integer equal to nothing, so nothing that is read back can be equal to it."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


class UnequalText(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class UnequalNumber(float):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = float.__hash__


class UnequalDict(dict[str, Any]):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None


class UnequalList(list[Any]):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None


class ElsewhereText(str):
    """Equal to the plain string, but of another hash: a dict can hold both as keys."""

    __slots__ = ()

    def __hash__(self) -> int:
        return ~str.__hash__(self)


class UpsideDown(dict[str, Any]):
    """Says other things of its members than it holds."""

    def __iter__(self) -> Any:
        return iter(["other"])

    def keys(self) -> Any:
        return ["other"]

    def values(self) -> Any:
        return [0]

    def items(self) -> Any:
        return [("other", 0)]

    def __getitem__(self, key: str) -> Any:
        return 0


@dataclass
class Point:
    x: int = 1


Pair = namedtuple("Pair", "left right")


def _round_trip(store: KVStore, value: Any) -> Any:
    store.create("round trip", value)
    back = store.read("round trip")
    store.delete("round trip")
    return back


# --- what reads back ------------------------------------------------------------------------------

PLAIN: Final[dict[str, Any]] = {
    "empty": {},
    "empty key": {"": ""},
    "constants": {"t": True, "f": False, "n": None},
    "integers": {"i": [0, 1, -1, 2**31, -(2**31), 2**53 + 1, 2**63, -(2**63), 2**64 - 1]},
    "floats": {"f": [0.0, -0.0, 0.1, -1.5, 1e16, 1e300, 5e-324, 1.7976931348623157e308, 2.0**53]},
    "one of three types": {"o": [1, 1.0, True], "z": [0, 0.0, False, None, ""]},
    "text": {"t": ["", "é", "€", "🐍", "\0", "\x1f\x7f\x80", '"\\/', "\u2028\u2029", "\ufffe"]},
    "keys": {"": 1, "\0": 2, '"': 3, "🐍": 4, "a": 5, "A": 6, "é": 7, "e\u0301": 8, "x" * 500: 9},
    "containers": {"a": [[], {}, [[]], [{}], {"a": []}], "b": {"c": {"d": [{"e": [1, [2]]}]}}},
    "numbers as text": {"1": 1, "1.0": "1", "NaN": "NaN", "null": "null", "Infinity": "-inf"},
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN.keys())
def test_json_reads_back_equal_and_of_the_same_types(store: KVStore, value: Any) -> None:
    assert identical(_round_trip(store, value), value)


@given(json_value)
def test_any_drawn_json_reads_back_equal_and_of_the_same_types(store: KVStore, value: Any) -> None:
    assert identical(_round_trip(store, value), value)


def test_values_stand_in_a_store_that_was_closed(store: KVStore, open_store: OpenStore) -> None:
    for name, value in PLAIN.items():
        store.create(name, value)
    store.close()
    assert all(identical(value, PLAIN[name]) for name, value in open_store().items())


def test_the_order_of_keys_is_kept(store: KVStore) -> None:
    value = {name: {"z": 1, "a": 2} for name in "zyxabc"}
    back = _round_trip(store, value)
    assert list(back) == list("zyxabc")
    assert list(back["z"]) == ["z", "a"]


def test_a_tuple_comes_back_as_a_list(store: KVStore) -> None:
    back = _round_trip(store, {"t": (1, (2, ()), [(3,)]), "e": ()})
    assert identical(back, {"t": [1, [2, []], [[3]]], "e": []})


def test_read_bytes_is_the_compact_json_in_utf_8(store: KVStore) -> None:
    value = {"name": "Ada é🐍", "tags": ["a", "b"], "n": {"x": 1.5, "y": None, "z": True}}
    store.create("k", value)
    encoded = store.read_bytes("k")
    assert type(encoded) is bytes
    assert encoded == json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


@given(json_value)
def test_read_bytes_is_what_any_json_parser_reads_as_the_value(store: KVStore, value: Any) -> None:
    store.create("k", value)
    encoded = store.read_bytes("k")
    store.delete("k")
    assert identical(json.loads(encoded.decode()), value)


def test_each_read_gives_a_value_of_its_own(store: KVStore) -> None:
    store.create("k", {"list": [1]})
    store.read("k")["list"].append(2)
    assert store.read("k") == {"list": [1]}


def test_changing_a_value_after_its_creation_changes_nothing_stored(store: KVStore) -> None:
    value: dict[str, Any] = {"list": [1], "dict": {}}
    store.create("k", value)
    value["list"].append(2)
    value["dict"]["new"] = 1
    assert store.read("k") == {"list": [1], "dict": {}}


def test_the_value_given_is_left_as_it_was(store: KVStore) -> None:
    inner = OrderedDict(a=(1, Level.LOW))
    value = {"o": inner}
    store.create("k", value)
    assert value["o"] is inner
    assert type(inner["a"]) is tuple
    assert type(inner["a"][1]) is Level


def test_a_member_that_occurs_twice_is_no_cycle(store: KVStore) -> None:
    shared = {"list": [1, 2]}
    assert _round_trip(store, {"a": shared, "b": [shared, shared]}) == {
        "a": shared,
        "b": [shared, shared],
    }


# --- subclasses -----------------------------------------------------------------------------------

EQUAL_SUBCLASSES: Final[dict[str, tuple[Any, Any]]] = {
    "OrderedDict as value": (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "OrderedDict inside": ({"o": OrderedDict(b=1, a=2)}, {"o": {"b": 1, "a": 2}}),
    "defaultdict": (defaultdict(list, a=[1]), {"a": [1]}),
    "Counter": ({"c": Counter("aab")}, {"c": {"a": 2, "b": 1}}),
    "IntEnum": ({"i": [Level.LOW, Level.HIGH]}, {"i": [1, 2**63]}),
    "IntFlag": ({"i": Mode.READ | Mode.WRITE}, {"i": 6}),
    "subclass of str": ({"s": Text("abc")}, {"s": "abc"}),
    "subclass of str as key": ({Text("abc"): 1}, {"abc": 1}),
    "subclass of float": ({"f": Number(1.5)}, {"f": 1.5}),
    "subclass of list": ({"l": Row([1, Row([2])])}, {"l": [1, [2]]}),
}


@pytest.mark.parametrize(
    ("value", "expected"), EQUAL_SUBCLASSES.values(), ids=EQUAL_SUBCLASSES.keys()
)
def test_a_subclass_that_equals_its_plain_type_is_stored_as_that(
    store: KVStore, value: Any, expected: Any
) -> None:
    back = _round_trip(store, value)
    assert identical(back, expected)
    assert back == value


UNEQUAL: Final[dict[str, Any]] = {
    "int": Unequal(1),
    "str": UnequalText("a"),
    "float": UnequalNumber(1.5),
    "dict": UnequalDict(a=1),
    "list": UnequalList([1]),
    "key of a dict": {UnequalText("a"): 1},
}


@pytest.mark.parametrize("item", UNEQUAL.values(), ids=UNEQUAL.keys())
def test_a_subclass_that_equals_nothing_is_refused(store: KVStore, item: Any) -> None:
    for value in ({"v": item}, {"v": [item]}, {"v": {"w": (item,)}}):
        with pytest.raises(InvalidValueError):
            store.create("k", value)
    assert len(store) == 0


def test_a_dict_subclass_that_equals_nothing_is_refused_as_the_value_itself(store: KVStore) -> None:
    with pytest.raises(InvalidValueError):
        store.create("k", UnequalDict(a=1))


STRANGE: Final[dict[str, Any]] = {
    "two equal keys of different hash": {"a": 1, ElsewhereText("a"): 2},
    "the same further in": {"v": [{"a": 1, ElsewhereText("a"): 2}]},
    "a dict that misreports itself": UpsideDown(a=1),
    "the same further in, again": {"v": UpsideDown(a=1)},
    "an enum of strings": {"v": Word.YES},
    "an enum of strings as key": {Word.YES: 1},
    "an integer key": {1: 1},
    "equal keys of two types": {"1": 1, 1: 1},
    "a bool key": {True: 1},
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_strange_reads_back_equal_or_is_refused(store: KVStore, value: Any) -> None:
    try:
        store.create("k", value)
    except InvalidValueError:
        assert "k" not in store
    else:
        assert store.read("k") == value


# --- what is refused ------------------------------------------------------------------------------

REFUSED: Final[dict[str, Any]] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "NaN in a subclass": Number("nan"),
    "2**64": 2**64,
    "-2**63 - 1": -(2**63) - 1,
    "10**5000": 10**5000,
    "an IntFlag out of range": Mode(2**70),
    "a high surrogate": "\ud800",
    "a surrogate in text": "text \udc00 text",
    "a surrogate in a subclass": Text("\ud800"),
    "a surrogate in a key": {"\ud800": 1},
    "bytes": b"bytes",
    "bytearray": bytearray(b"bytes"),
    "memoryview": memoryview(b"bytes"),
    "set": {1},
    "frozenset": frozenset({1}),
    "datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "naive datetime": datetime(2026, 1, 1),
    "date": date(2026, 1, 1),
    "time": time(12, 30),
    "timedelta": timedelta(seconds=1),
    "UUID": UUID(int=1),
    "Decimal": Decimal("1.5"),
    "Fraction": Fraction(1, 2),
    "complex": 1j,
    "Enum of int": Color.RED,
    "Enum of str": Color.NAMED,
    "Enum class": Color,
    "dataclass": Point(),
    "namespace": types.SimpleNamespace(a=1),
    "UserDict": UserDict(a=1),
    "ChainMap": ChainMap({"a": 1}),
    "mapping proxy": types.MappingProxyType({"a": 1}),
    "dict view": {"a": 1}.items(),
    "deque": deque([1]),
    "array": array("i", [1]),
    "range": range(3),
    "generator": (number for number in (1, 2)),
    "path": PurePosixPath("a"),
    "function": print,
    "class": int,
    "object": object(),
    "Ellipsis": ...,
    "NotImplemented": NotImplemented,
    "int key": {1: "a"},
    "int key after a str key": {"a": 1, 2: 2},
    "IntEnum key": {Level.LOW: 1},
    "None key": {None: 1},
    "bool key": {True: 1},
    "float key": {1.5: 1},
    "bytes key": {b"a": 1},
    "tuple key": {("a",): 1},
    "datetime key": {datetime(2026, 1, 1, tzinfo=UTC): 1},
    "UUID key": {UUID(int=1): 1},
    "Enum key": {Color.NAMED: 1},
}

WRAPPERS: Final[dict[str, Callable[[Any], Any]]] = {
    "at the top": lambda item: {"v": item},
    "in a dict": lambda item: {"a": {"b": item}},
    "in a list": lambda item: {"a": [1, item]},
    "in a tuple": lambda item: {"a": (item,)},
    "in an OrderedDict": lambda item: OrderedDict(a=OrderedDict(b=item)),
    "after everything else": lambda item: {"a": {"b": [0.5, {"c": [Level.LOW, (1, item)]}]}},
    "90 deep": lambda item: _buried(item, 90),
}


def _buried(item: Any, depth: int) -> Any:
    for _ in range(depth):
        item = {"n": item}
    return item


@pytest.mark.parametrize("item", REFUSED.values(), ids=REFUSED.keys())
def test_what_json_cannot_give_back_is_refused_at_any_depth(store: KVStore, item: Any) -> None:
    for where, wrap in WRAPPERS.items():
        with pytest.raises(InvalidValueError):
            store.create("k", wrap(item))
            pytest.fail(f"{where}: stored as {store.read_bytes('k')!r}")
    assert len(store) == 0


NO_DICTS: Final[dict[str, Any]] = {
    "None": None,
    "list": [1],
    "list of pairs": [("a", 1)],
    "tuple": (),
    "str": "{}",
    "bytes": b"{}",
    "int": 1,
    "float": 1.5,
    "bool": True,
    "UserDict": UserDict(a=1),
    "mapping proxy": types.MappingProxyType({"a": 1}),
    "ChainMap": ChainMap({"a": 1}),
    "dataclass": Point(),
    "the class dict": dict,
    "namedtuple": Pair(1, 2),
}


@pytest.mark.parametrize("value", NO_DICTS.values(), ids=NO_DICTS.keys())
def test_a_value_that_is_no_dict_is_refused(store: KVStore, value: Any) -> None:
    with pytest.raises(InvalidValueError):
        store.create("k", value)
    assert len(store) == 0


def test_another_store_is_no_value(store: KVStore) -> None:
    with pytest.raises(InvalidValueError):
        store.create("k", store)  # type: ignore[arg-type]


def test_a_value_whose_repr_raises_is_still_an_invalid_value(store: KVStore) -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError

    with pytest.raises(InvalidValueError):
        store.create("k", {"v": Shy()})


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, list, tuple, Row, OrderedDict])
def test_a_value_may_be_100_deep_and_no_deeper(store: KVStore, kind: type) -> None:
    deepest, deeper = nested(MAX_DEPTH, kind), nested(MAX_DEPTH + 1, kind)
    if kind is OrderedDict:
        deepest, deeper = OrderedDict(deepest), OrderedDict(deeper)
    assert _depth(deepest) == MAX_DEPTH
    assert _depth(_round_trip(store, deepest)) == MAX_DEPTH
    with pytest.raises(InvalidValueError):
        store.create("k", deeper)
    assert len(store) == 0


def _depth(item: Any) -> int:
    if isinstance(item, dict):
        return 1 + max(map(_depth, item.values()), default=0)
    if isinstance(item, list | tuple):
        return 1 + max(map(_depth, item), default=0)
    return 0


def test_scalars_at_the_deepest_level_are_stored(store: KVStore) -> None:
    value = _buried([1, "a", None, 1.5, Level.LOW], MAX_DEPTH - 1)
    assert identical(_round_trip(store, value), _buried([1, "a", None, 1.5, 1], MAX_DEPTH - 1))


@pytest.mark.parametrize("depth", [255, 1_000, 100_000])
def test_a_value_far_too_deep_is_refused_like_any_other(store: KVStore, depth: int) -> None:
    """No RecursionError, no crash of the interpreter."""
    for value in (_buried(1, depth), {"v": [_buried(1, depth)]}, _buried(Level.LOW, depth)):
        with pytest.raises(InvalidValueError):
            store.create("k", value)


def test_a_value_that_contains_itself_is_refused(store: KVStore) -> None:
    circle: dict[str, Any] = {}
    circle["again"] = circle
    ring: list[Any] = []
    ring.append(ring)
    for value in (circle, {"v": ring}, {"v": (ring,)}, OrderedDict(v=circle)):
        with pytest.raises(InvalidValueError):
            store.create("k", value)


@pytest.mark.parametrize("character", ["x", "é", "€", "🐍", '"', "\n", "\0"])
def test_a_value_may_be_16384_bytes_of_json_and_no_more(store: KVStore, character: str) -> None:
    each = json_size(character) - 2
    count, rest = divmod(MAX_VALUE_SIZE - json_size({"v": ""}), each)
    value = {"v": character * count + "x" * rest}
    assert json_size(value) == MAX_VALUE_SIZE
    assert _round_trip(store, value) == value
    value["v"] += "x"
    with pytest.raises(ValueTooLargeError):
        store.create("k", value)
    assert len(store) == 0


def test_the_limit_holds_for_many_small_members_too(store: KVStore) -> None:
    value = {"v": [1] * 8187 + [10]}
    assert json_size(value) == MAX_VALUE_SIZE
    assert _round_trip(store, value) == value
    value["v"][0] = 10
    assert json_size(value) == MAX_VALUE_SIZE + 1
    with pytest.raises(ValueTooLargeError):
        store.create("k", value)


def test_the_limit_is_on_the_bytes_of_the_value_alone(store: KVStore) -> None:
    """The longest key and a TTL take nothing from it."""
    value = sized_value(MAX_VALUE_SIZE)
    store.create("🐍" * 32, value, ttl=10**10)
    assert store.read("🐍" * 32) == value
    assert len(store.read_bytes("🐍" * 32)) == MAX_VALUE_SIZE


@pytest.mark.parametrize("size", [MAX_VALUE_SIZE + 1, 65_535, 65_536, 65_537, 2**24])
def test_a_value_of_any_larger_size_is_too_large(store: KVStore, size: int) -> None:
    with pytest.raises(ValueTooLargeError):
        store.create("k", sized_value(size))
    assert len(store) == 0


def test_every_size_reads_back_whole(store: KVStore) -> None:
    """From the smallest to the largest, around every boundary of the size classes."""
    boundaries = [*range(64, 513, 32), *(2**n * m // 8 for n in range(9, 14) for m in range(8, 17))]
    sizes = {2, 12, 13, MAX_VALUE_SIZE - 1, MAX_VALUE_SIZE}
    for boundary in boundaries:
        for overhead in (32 + 1, 32 + 6):  # a record's header and key
            sizes |= {boundary - overhead + off for off in (-1, 0, 1)}
    usable = sorted(size for size in sizes if size == 2 or 12 <= size <= MAX_VALUE_SIZE)
    for size in usable:
        store.create(f"{size:06}", sized_value(size, size % 7))
    for size in usable:
        assert store.read(f"{size:06}") == sized_value(size, size % 7)
        assert len(store.read_bytes(f"{size:06}")) == size
