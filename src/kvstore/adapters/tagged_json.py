"""Python values as JSON: what JSON lacks becomes an object of one member, whose name is a tag.

>>> as_json({"sizes": (1, 2), "image": b"GIF"})
{'sizes': {'$tuple': [1, 2]}, 'image': {'$bytes': 'R0lG'}}
>>> from_json({"sizes": {"$tuple": [1, 2]}, "image": {"$bytes": "R0lG"}})
{'sizes': (1, 2), 'image': b'GIF'}

A container of a subclass is stored as the plain one that it equals: a named tuple as a tuple. All
else is left as it is, for the store to take or to refuse: nothing is ever pickled, and nothing of a
type that is not named here is made when it is read.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

_DICT: Final = "$dict"
# The tags, part of what is stored: add, never rename.
_SEQUENCES: Final[dict[type, str]] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_CONTAINERS: Final[tuple[type, ...]] = (dict, list, *_SEQUENCES)
_SCALARS: Final[dict[type, tuple[str, Callable[[Any], str]]]] = {
    bytes: ("$bytes", lambda value: b64encode(value).decode()),
    datetime: ("$datetime", datetime.isoformat),
    date: ("$date", date.isoformat),
    Decimal: ("$decimal", str),
    UUID: ("$uuid", str),
}


def as_json(value: Any) -> Any:
    """Return `value` as dicts, lists and scalars that JSON has, as far as its types are known.

    Raises:
        RecursionError: it is nested too deep, or holds itself.
    """
    kind = type(value)
    if kind is dict:
        if all(type(name) is str for name in value) and not _looks_tagged(value):
            return {name: as_json(member) for name, member in value.items()}
        return {_DICT: [[as_json(name), as_json(member)] for name, member in value.items()]}
    if kind is list:
        return [as_json(member) for member in value]
    if kind in _SEQUENCES:
        return {_SEQUENCES[kind]: [as_json(member) for member in value]}
    if kind in _SCALARS:
        tag, text_of = _SCALARS[kind]
        return {tag: text_of(value)}
    if isinstance(value, _CONTAINERS) and value == (plain := _plain(value)):
        return as_json(plain)
    return value


def _plain(value: Any) -> Any:
    """Return a container of a subclass as the one that it derives from."""
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(value, kind))
    # By the methods of the plain one: those of a subclass may tell other members.
    return kind(dict.items(value) if kind is dict else kind.__iter__(value))


def from_json(value: Any) -> Any:
    """Return the value that `as_json` made this one of.

    Raises:
        ValueError: a tag that is not known, as a later version may have written it.
    """
    if type(value) is list:
        return [from_json(member) for member in value]
    if type(value) is not dict:
        return value
    if not _looks_tagged(value):
        return {name: from_json(member) for name, member in value.items()}
    [(tag, content)] = value.items()
    if tag not in _READERS:
        raise ValueError(f"unknown tag {tag!r} of a stored value")
    return _READERS[tag](content)


def _looks_tagged(value: dict[str, Any]) -> bool:
    return len(value) == 1 and next(iter(value)).startswith("$")


def _members(content: Iterable[Any]) -> Iterable[Any]:
    return map(from_json, content)


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    _DICT: lambda content: dict(map(from_json, content)),
    "$tuple": lambda content: tuple(_members(content)),
    "$set": lambda content: set(_members(content)),
    "$frozenset": lambda content: frozenset(_members(content)),
    "$bytes": b64decode,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$decimal": Decimal,
    "$uuid": UUID,
}
