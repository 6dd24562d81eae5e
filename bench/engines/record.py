"""What every engine stores: a value as JSON, and when it expires.

Expiry is in milliseconds since 1970, 0 for never. Engines of plain bytes store it in eight bytes
before the JSON.
"""

from collections.abc import Callable
from struct import Struct
from time import time_ns
from typing import Any, Final

import orjson

_EXPIRY: Final = Struct("<Q")


def now() -> int:
    """Return the milliseconds since 1970."""
    return time_ns() // 1_000_000


def expiry_of(ttl: int | None) -> int:
    """Return when what is stored now for `ttl` seconds expires."""
    return now() + ttl * 1000 if ttl else 0


def encode(value: dict[str, Any], ttl: int | None) -> bytes:
    """Return expiry and value as bytes."""
    return _EXPIRY.pack(now() + ttl * 1000 if ttl else 0) + orjson.dumps(value)


def expiry_prefix(ttl: int | None) -> bytes:
    """Return what `encode` puts before the JSON."""
    return _EXPIRY.pack(expiry_of(ttl))


def renew(key: str, stored: bytes | None, ttl: int | None) -> bytes:
    """Return what `encode` returned with another expiry.

    Raises:
        KeyError: it has expired, or there is nothing: `stored` is None.
    """
    if stored is None or has_expired(stored):
        raise KeyError(key)
    return expiry_prefix(ttl) + stored[_EXPIRY.size :]


def has_expired(stored: Any) -> bool:
    """Say whether what `encode` returned has expired."""
    expires_at: int = _EXPIRY.unpack_from(stored)[0]
    return 0 < expires_at <= now()


def decode(key: str, stored: Any) -> dict[str, Any]:
    """Return the value of what `encode` returned.

    Raises:
        KeyError: it has expired, or there is nothing: `stored` is None.
    """
    if stored is None or 0 < _EXPIRY.unpack_from(stored)[0] <= now():
        raise KeyError(key)
    value: dict[str, Any] = orjson.loads(stored[_EXPIRY.size :])
    return value


class BytesEngine:
    """What engines of plain bytes share: reading without a lock, and closing."""

    def __init__(self, get: Callable[[bytes], bytes | None], close: Callable[[], object]) -> None:
        self._get = get
        self._close = close

    def read(self, key: str) -> dict[str, Any]:
        return decode(key, self._get(key.encode()))

    def close(self) -> None:
        self._close()
