"""A record as a line of JSON, and back: what `dump` writes and `load` reads.

A line is an object of `key`, `value`, and the two times in whole milliseconds since 1970 UTC:
`created_at`, and `expires_at`, which is null where the record does not expire. `load` takes a line
without `created_at` for one created now, and one without `expires_at` for one that does not expire.
"""

import json
import re
from typing import Any, Final

import orjson

from kvstore import KVStoreError
from kvstore.clock import LAST_MS
from kvstore.format.codec import encode_key, encode_value, parse
from kvstore.format.layout import TIME_LIMIT

from .records import Record

LONGEST_LINE: Final = 1024 * 1024
_FIELDS: Final = frozenset({"key", "value", "created_at", "expires_at"})
# The least and the most that is allowed. What says that it was created later than any clock could
# say would leave a store few stamps for what follows it.
_LIMITS: Final = {"created_at": (0, LAST_MS), "expires_at": (1, TIME_LIMIT - 1)}
# orjson makes a float of an integer out of its range, so the slower parser has to tell.
_LONG_INTEGER: Final = re.compile(rb"\d{19}")


class MalformedLineError(ValueError):
    """A line is not what `dump` writes. The message says what is wrong with it."""


def to_line(record: Record) -> bytes:
    """Return the line of a record."""
    return b'{"key":%b,"value":%b,"created_at":%d,"expires_at":%b}\n' % (
        orjson.dumps(record.key),
        record.value,
        record.created_at,
        b"%d" % record.expires_at if record.expires_at else b"null",
    )


def to_resp(record: Record) -> bytes:
    """Return the Redis command that sets the record: ``SET key json``, ``PXAT ms`` if it expires.

    https://redis.io/docs/latest/develop/reference/protocol-spec/
    """
    parts = [b"SET", record.key.encode(), record.value]
    if record.expires_at:
        parts += [b"PXAT", b"%d" % record.expires_at]
    strings = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%b" % (len(parts), strings)


def from_line(line: bytes, now_ms: int) -> Record:
    """Return the record of a line; its value is checked, and compact JSON.

    Raises:
        MalformedLineError: it is not JSON, has other fields, or what the store does not take.
    """
    if len(line) > LONGEST_LINE:
        raise MalformedLineError(f"longer than {LONGEST_LINE:,} bytes")
    try:
        fields = parsed(line)
    except (ValueError, RecursionError) as error:
        raise MalformedLineError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise MalformedLineError("not a JSON object")
    if not {"key", "value"} <= fields.keys() <= _FIELDS:
        names = ", ".join(sorted(fields)) or "none"
        raise MalformedLineError(
            f"its fields are {names[:200]}; expected are key, value, created_at, expires_at"
        )
    try:
        encode_key(fields["key"])
        value = encode_value(fields["key"], fields["value"])
    except KVStoreError as error:
        raise MalformedLineError(str(error)) from error
    created_at = _time(fields, "created_at")
    expires_at = _time(fields, "expires_at")
    created_at = now_ms if created_at is None else created_at
    return Record(fields["key"], value, created_at, expires_at or 0)


def parsed(text: bytes) -> Any:
    """Return what JSON in UTF-8 says; an integer out of range stays one, for the store to refuse.

    Raises:
        ValueError, RecursionError: it is not JSON.
        MemoryError: there is too little memory to parse it.
    """
    return (json.loads if _LONG_INTEGER.search(text) else parse)(text)


def _time(fields: dict[str, Any], name: str) -> int | None:
    time = fields.get(name)
    if time is None:
        return None
    least, most = _LIMITS[name]
    if type(time) is not int or not least <= time <= most:
        raise MalformedLineError(
            f"{name} is {str(time)[:40]}, allowed are whole milliseconds since 1970, {least} to "
            f"{most:,}"
        )
    return time
