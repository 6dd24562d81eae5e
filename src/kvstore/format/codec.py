"""Keys and values: what the store takes, and how it becomes bytes.

Knows nothing of files. A value is stored as compact JSON and only if it reads back equal. orjson
alone does not keep that promise: it writes NaN as ``null`` and takes UUID and Enum. So one walk
over the value comes first; it is short for small flat objects, which are the common case, and hands
what is out of the ordinary to slower code.
"""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from types import NoneType
from typing import TYPE_CHECKING, Any, Final

import orjson

from kvstore.errors import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    ValueTooLargeError,
)

from .layout import MAX_KEY_CHARACTERS, MAX_VALUE_SIZE

JSONObject = dict[str, Any]
"""What every value is."""

if TYPE_CHECKING:
    from typing_extensions import (
        TypeVar,
    )  # type checkers have it; that of Python 3.12 has no default

    Value = TypeVar("Value", bound=Mapping[str, Any], default=JSONObject)
else:
    from typing import TypeVar

    Value = TypeVar("Value", bound=Mapping[str, Any])

MAX_DEPTH: Final = 100
MAX_TTL_SECONDS: Final = 10**10

# Types that need no look at the value: orjson itself refuses integers out of range and lone
# surrogates, and the rest cannot go wrong.
_SAFE: Final = frozenset({str, int, bool, NoneType})
_EXACT: Final = (str, int, float, dict, list, tuple)
JSON_OPTIONS: Final = (
    orjson.OPT_PASSTHROUGH_SUBCLASS
    | orjson.OPT_PASSTHROUGH_DATACLASS
    | orjson.OPT_PASSTHROUGH_DATETIME
)


class _NotStorable(Exception):
    """A value that cannot be stored: what is wrong, and the way to it from the outside in."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = ""


class _NeedsFullWalk(Exception):
    """The quick walk met a type that only `_plain` can classify."""


def encode_key(key: object) -> bytes:
    """Return the UTF-8 of `key`, 1 to 128 bytes.

    Raises:
        InvalidKeyError: it is not a string of 1 to 32 characters that UTF-8 can express.
    """
    if type(key) is str and 0 < len(key) <= MAX_KEY_CHARACTERS:
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise InvalidKeyError(
                f"key {key!r}: character {error.start} is a lone surrogate "
                f"(U+{ord(key[error.start]):04X}), which UTF-8 cannot express"
            ) from None
    if isinstance(key, str):
        if type(key) is not str:
            return encode_key(str.__str__(key))  # a subclass may tell another length
        raise InvalidKeyError(
            f"key {key[:40]!r}{'…' if len(key) > 40 else ''}: {len(key):,} characters, "
            f"allowed are 1 to {MAX_KEY_CHARACTERS}"
        )
    raise InvalidKeyError(
        f"key {_shown(key)}: {type(key).__name__}, allowed is a str of 1 to "
        f"{MAX_KEY_CHARACTERS} characters"
    )


def check_ttl(key: str, ttl: object) -> int:
    """Return `ttl` in milliseconds.

    Raises:
        InvalidTTLError: it is not an int from 1 to 10**10 seconds.
    """
    if type(ttl) is not bool and isinstance(ttl, int):
        seconds = int.__int__(ttl)  # a subclass may tell another number
        if 1 <= seconds <= MAX_TTL_SECONDS:
            return seconds * 1000
    raise InvalidTTLError(
        f"key {key!r}: time-to-live is {_shown(ttl)} ({type(ttl).__name__}), "
        f"allowed is an int of 1 to {MAX_TTL_SECONDS:,} seconds, or None"
    )


def encode_value(key: str, value: Mapping[str, Any]) -> bytes:
    """Return `value` as compact JSON in UTF-8, at most 16,384 bytes. `key` is for messages.

    Raises:
        InvalidValueError: it is no dict, or something in it would not read back equal.
        ValueTooLargeError: its JSON is too long.
    """
    try:
        if type(value) is not dict:
            raise _NeedsFullWalk
        _walk(value.values(), 1)
        encoded = orjson.dumps(value, None, JSON_OPTIONS)
    except (_NeedsFullWalk, _NotStorable, TypeError, RecursionError):
        encoded = _encode_unusual(key, value)
    if len(encoded) > MAX_VALUE_SIZE:
        raise ValueTooLargeError(
            f"key {key!r}: value is {len(encoded):,} bytes of JSON, limit {MAX_VALUE_SIZE:,}"
        )
    return encoded


def decode_value(key: str, encoded: bytes) -> Any:
    """Return the value that `encode_value` made these bytes of.

    Raises:
        CorruptStoreError: they are not JSON, although their checksum was right.
        MemoryError: there is too little memory to parse them.
    """
    try:
        return parse(encoded)
    except ValueError as error:
        raise CorruptStoreError(f"key {key!r}: its value is not JSON: {error}") from error


def parse(encoded: bytes) -> Any:
    """Return what these bytes say as JSON.

    Raises:
        ValueError: they are not JSON.
        MemoryError: there is too little memory to parse them.
    """
    try:
        return orjson.loads(encoded)
    except orjson.JSONDecodeError as error:
        # An object's first character is never wrong: orjson says so where it gets no memory.
        if error.pos == 0 and error.doc.startswith("{"):
            raise MemoryError(f"too little memory to parse {len(encoded):,} bytes") from error
        raise


def _walk(items: Iterable[Any], depth: int) -> None:
    """Raise where `orjson.dumps` would write something that does not read back equal."""
    for item in items:
        kind = type(item)
        if kind in _SAFE:
            continue
        if kind is float:
            if not isfinite(item):
                raise _NeedsFullWalk
        elif depth == MAX_DEPTH:
            raise _NeedsFullWalk
        elif kind is dict:
            _walk(item.values(), depth + 1)
        elif kind is list or kind is tuple:
            _walk(item, depth + 1)
        else:
            raise _NeedsFullWalk


def _encode_unusual(key: str, value: object) -> bytes:
    """Encode a value that holds subclasses, or say what is wrong with it and where."""
    try:
        if not isinstance(value, dict):
            raise _NotStorable(f"{_shown(value)} is a {type(value).__name__}, allowed is a dict")
        return orjson.dumps(_plain(value, 1), None, JSON_OPTIONS)
    except _NotStorable as refused:
        raise InvalidValueError(f"key {key!r}: value{refused.path}: {refused.reason}") from None
    except TypeError as error:
        raise InvalidValueError(f"key {key!r}: value: {error}") from error


def _plain(item: Any, depth: int) -> Any:
    """Return `item` in the exact types of JSON, equal to it; raise `_NotStorable` for others."""
    if item is None or isinstance(item, bool):
        return item
    if isinstance(item, str):
        return _equal(item, str.__str__(item), _check_text)
    if isinstance(item, int):
        return _equal(item, int.__int__(item), _check_integer)
    if isinstance(item, float):
        return _equal(item, float.__float__(item), _check_float)
    if not isinstance(item, dict | list | tuple):
        raise _NotStorable(f"{_shown(item)} is a {type(item).__name__}, which JSON does not have")
    if depth > MAX_DEPTH:
        raise _NotStorable(f"nested more than {MAX_DEPTH} deep")
    # A subclass has to equal the plain container of the same members; each of these is judged by
    # itself, so that a tuple among them may come back as a list.
    if isinstance(item, dict):
        members = dict(dict.items(item))
        _equal(item, members)
        plain = {
            _plain_name(name): _at(f"[{_shown(name)}]", member, depth)
            for name, member in members.items()
        }
        if len(plain) != len(members):
            raise _NotStorable("two of its keys are the same string")
        return plain
    sequence = list(list.__iter__(item) if isinstance(item, list) else tuple.__iter__(item))
    _equal(item, sequence if isinstance(item, list) else tuple(sequence))
    return [_at(f"[{index}]", member, depth) for index, member in enumerate(sequence)]


def _plain_name(name: object) -> str:
    if not isinstance(name, str):
        raise _NotStorable(f"its key {_shown(name)} is a {type(name).__name__}, allowed is a str")
    plain: str = _equal(name, str.__str__(name), _check_text)
    return plain


def _at(step: str, member: object, depth: int) -> Any:
    try:
        return _plain(member, depth + 1)
    except _NotStorable as refused:
        refused.path = step + refused.path
        raise


def _equal(item: Any, plain: Any, check: Callable[[Any], None] | None = None) -> Any:
    """Return `plain`, which stands for `item`, once it has passed `check` and is equal to it."""
    if check is not None:
        check(plain)
    if type(item) not in _EXACT and not (item == plain):
        raise _NotStorable(
            f"{_shown(item)} is a {type(item).__name__}, which reads back as {plain!r}"
        )
    return plain


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _NotStorable(
            f"character {error.start} of {_shown(text)} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), which UTF-8 cannot express"
        ) from None


def _check_integer(number: int) -> None:
    if not -(2**63) <= number < 2**64:
        raise _NotStorable(
            f"an integer of {number.bit_length()} bits, allowed is -2**63 to 2**64-1"
        )


def _check_float(number: float) -> None:
    if not isfinite(number):
        raise _NotStorable(f"{number!r}, allowed is a finite number")


def _shown(item: object) -> str:
    """Return a short repr, whatever `item` is."""
    if isinstance(item, int) and not isinstance(item, bool) and item.bit_length() > 200:
        return f"an integer of {item.bit_length():,} bits"
    try:
        text = repr(item)
    except Exception as error:
        return f"<{type(item).__name__} whose repr raises {type(error).__name__}>"
    return text if len(text) <= 60 else text[:59] + "…"
