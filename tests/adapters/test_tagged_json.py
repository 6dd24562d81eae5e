"""What JSON does not have is stored as an object with a tag, and comes back as it was."""

import doctest
from collections import Counter, OrderedDict, defaultdict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.adapters import tagged_json
from kvstore.adapters.tagged_json import as_json, from_json


def through_json(value: Any) -> Any:
    return from_json(orjson.loads(orjson.dumps(as_json(value))))


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-3, minutes=-30))]))
    | st.dates()
    | st.decimals(allow_nan=False)
    | st.uuids()
)
names = st.text() | st.sampled_from(["$tuple", "$bytes", "$", "$dict"])
hashable = st.deferred(lambda: scalars | st.tuples(scalars, scalars) | st.frozensets(scalars))
containers = st.deferred(
    lambda: (
        st.sets(hashable)
        | st.lists(values)
        | st.lists(values).map(tuple)
        | st.dictionaries(names, values)
        | st.dictionaries(hashable, values)
    )
)
values: st.SearchStrategy[Any] = st.deferred(lambda: hashable | containers)


@given(values)
def test_a_value_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    back = through_json(value)
    assert back == value
    assert typed(back) == typed(value)


def typed(value: Any) -> Any:
    """Return what tells `1` from `True` and `1.0`, and a list from a tuple, at any depth."""
    if isinstance(value, dict):
        members: Any = frozenset((typed(name), typed(member)) for name, member in value.items())
    elif isinstance(value, list | tuple):
        members = tuple(map(typed, value))
    elif isinstance(value, set | frozenset):
        members = frozenset(map(typed, value))
    elif isinstance(value, datetime):
        members = repr(value.replace(fold=0))  # which equality does not look at, and ISO lacks
    else:
        members = repr(value)
    return type(value).__name__, members


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ((1, 2), {"$tuple": [1, 2]}),
        (b"\xff", {"$bytes": "/w=="}),
        ({1: "one"}, {"$dict": [[1, "one"]]}),
        ({"$bytes": "no bytes"}, {"$dict": [["$bytes", "no bytes"]]}),
        ({"$a": 1, "b": 2}, {"$a": 1, "b": 2}),
        (frozenset({1}), {"$frozenset": [1]}),
        (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), {"$datetime": "2026-01-02T03:04:05.000006+00:00"}),
        (date(2026, 1, 2), {"$date": "2026-01-02"}),
        (Decimal("1.10"), {"$decimal": "1.10"}),
        (UUID(int=1), {"$uuid": "00000000-0000-0000-0000-000000000001"}),
    ],
)
def test_what_is_stored_stays_as_it_is_from_version_to_version(value: Any, stored: Any) -> None:
    assert as_json(value) == stored
    assert from_json(stored) == value


class Point(NamedTuple):
    x: int
    y: int


class Names(set[str]):
    pass


class Sly(dict[str, int]):
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Point(1, 2), (1, 2)),
        (OrderedDict(a=(1, 2)), {"a": (1, 2)}),
        (OrderedDict({"$bytes": "R0lG"}), {"$bytes": "R0lG"}),
        (OrderedDict({"$decimal": "no number"}), {"$decimal": "no number"}),
        (defaultdict(set, {1: {2}}), {1: {2}}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (Names({"Ada"}), {"Ada"}),
        ({Point(1, 2): b"x"}, {(1, 2): b"x"}),
    ],
)
def test_of_a_containers_subclass_the_plain_one_comes_back(
    value: Any, plain: Any, deep: bool
) -> None:
    back = through_json(({"in": [value]},) if deep else value)
    expected = ({"in": [plain]},) if deep else plain
    assert back == expected
    assert typed(back) == typed(expected)


@pytest.mark.parametrize("value", [Sly(a=1), Exception(), object(), as_json])
def test_what_has_no_tag_is_left_to_the_store_as_it_is(value: Any) -> None:
    assert as_json([value])[0] is value


def test_a_tag_of_a_later_version_is_an_error_and_not_a_dict() -> None:
    with pytest.raises(ValueError, match=r"unknown tag '\$complex'"):
        from_json([{"$complex": [1, 2]}])


def test_the_examples_are_true() -> None:
    assert doctest.testmod(tagged_json).attempted
    assert not doctest.testmod(tagged_json).failed
