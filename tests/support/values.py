"""Values: strategies that draw them, their size by other means than the store's, exact equality."""

import json
import math
from typing import Any, Final

from hypothesis import strategies as st

from .keys import CHARACTERS

MAX_VALUE_SIZE: Final = 16_384
MAX_DEPTH: Final = 100

Value = dict[str, Any]

_text = st.text(CHARACTERS, max_size=20)
json_scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    _text,
)
json_item = st.recursive(
    json_scalar,
    lambda items: st.one_of(st.lists(items, max_size=5), st.dictionaries(_text, items, max_size=5)),
    max_leaves=20,
)
json_value = st.dictionaries(_text, json_item, max_size=6)


def json_size(value: object) -> int:
    """Return the bytes of `value` as compact JSON in UTF-8, counted by the standard library."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def sized_value(size: int, mark: int = 0) -> Value:
    """Return a value of exactly `size` bytes of JSON, 2 or at least 12, that tells its `mark`."""
    if size == 2:
        return {}
    empty = json_size({"n": mark, "p": ""})
    if size < empty:
        value: Value = {"p": "x" * (size - json_size({"p": ""}))}
    else:
        value = {"n": mark, "p": "x" * (size - empty)}
    assert json_size(value) == size
    return value


def nested(depth: int, kind: Any = dict) -> Value:
    """Return a value of `depth` levels, itself the first; those below are of `kind`."""
    item: Any = kind()
    for _ in range(depth - 2):
        item = kind({"n": item}) if issubclass(kind, dict) else kind([item])
    return {"n": item} if depth > 1 else {}


def identical(one: Any, other: Any) -> bool:
    """Return whether two items are equal and of the same types throughout: 1 is not True or 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)
