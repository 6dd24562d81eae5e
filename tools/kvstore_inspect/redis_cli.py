"""A record as `redis-cli` prints it: what comes back from a Redis or Valkey server.

Three lines a key, which are the replies to ``ECHO key``, ``GET key`` and ``PEXPIRETIME key`` as
``redis-cli --no-raw`` writes them: strings quoted, with escapes for what is not printable ASCII, so
that each is one line whatever is in it. PEXPIRETIME is of Redis 7.0 and of every Valkey.
"""

import re
from collections.abc import Sequence
from typing import Final

from kvstore import KVStoreError
from kvstore.format.codec import encode_key, encode_value
from kvstore.format.layout import MAX_KEY_CHARACTERS, TIME_LIMIT

from .jsonl import LONGEST_LINE, MalformedLineError, parsed
from .records import Record
from .terminal import escaped

LINES: Final = 3  # of a key
IGNORED: Final = re.compile(rb"(?:\(\d+\.\d\ds\))?\s*")  # how long a slow reply took
PIPELINE: Final = """\
redis-cli --no-raw --scan \\
| awk '{ print "ECHO " $0; print "GET " $0; print "PEXPIRETIME " $0 }' \\
| redis-cli --no-raw \\
| kvstore-inspect load data.kvs --format redis-cli"""

_STRING: Final = re.compile(rb'"((?:[^"\\]|\\(?:["\\abnrt]|x[0-9a-f]{2}))*)"')
_ESCAPE: Final = re.compile(rb"\\(?:x(..)|(.))")
_ESCAPES: Final = {b"a": b"\a", b"b": b"\b", b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_INTEGER: Final = re.compile(rb"\(integer\) (-?\d{1,19})")
_NO_EXPIRY: Final = -1
_ABSENT: Final = -2


class UnfitError(ValueError):
    """A key of the server that a store cannot hold as it is. The message names key and reason."""


def from_replies(lines: Sequence[bytes], now_ms: int) -> Record:
    """Return the record of a key's three lines, created at `now_ms`; its value is compact JSON.

    Raises:
        UnfitError: the store cannot hold it: its key, its type or its value.
        MalformedLineError: the lines are no such replies, or not all of them.
    """
    if len(lines) < LINES:
        raise MalformedLineError(f"the input ends within the {LINES} lines of a key")
    echoed, got, expiry = (line.rstrip(b"\r\n") for line in lines)
    if len(echoed) > LONGEST_LINE:
        start = escaped(echoed[1:41].decode("ascii", "replace"))
        raise UnfitError(f"key {start}…: is longer than {MAX_KEY_CHARACTERS} characters")
    name = _string(echoed, "ECHO")
    expires_at = _expiry(expiry)
    try:
        key = name.decode()
    except UnicodeDecodeError:
        raise UnfitError(f"key {repr(name)[2:-1]}: is not UTF-8") from None
    if got == b"(nil)" or expires_at == _ABSENT:
        raise UnfitError(f"key {escaped(key)}: was gone before it was read")
    if got.startswith(b"(error) WRONGTYPE"):
        raise UnfitError(f"key {escaped(key)}: is no string on the server")
    if len(got) > LONGEST_LINE:
        raise UnfitError(f"key {escaped(key)}: its value is longer than {LONGEST_LINE:,} bytes")
    value = _string(got, "GET")
    try:
        encode_key(key)
        encoded = encode_value(key, parsed(value))
    except KVStoreError as error:
        raise UnfitError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise UnfitError(f"key {escaped(key)}: its value is not JSON: {error}") from error
    return Record(key, encoded, now_ms, max(0, expires_at))


def _string(reply: bytes, command: str) -> bytes:
    quoted = _STRING.fullmatch(reply)
    if not quoted:
        raise _unexpected(reply, command, "a string in quotes")
    return _ESCAPE.sub(_unescaped, quoted[1])


def _unescaped(escape: re.Match[bytes]) -> bytes:
    digits, letter = escape.groups()
    return bytes.fromhex(digits.decode()) if digits else _ESCAPES.get(letter, letter)


def _expiry(reply: bytes) -> int:
    integer = _INTEGER.fullmatch(reply)
    if not integer:
        raise _unexpected(reply, "PEXPIRETIME", "an integer")
    return min(int(integer[1]), TIME_LIMIT - 1)


def _unexpected(reply: bytes, command: str, expected: str) -> MalformedLineError:
    said = escaped(reply[:200].decode("utf-8", "replace"))
    return MalformedLineError(f"expected {expected} as the reply to {command}, not {said}")
