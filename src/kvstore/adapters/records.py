"""What the adapters share: records under names of any length, in a file of one process."""

import os
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Final

from kvstore.errors import InvalidKeyError, InvalidValueError, StoreLockedError
from kvstore.format.codec import JSONObject, encode_value
from kvstore.store import KVStore

_DIGEST_SIZE: Final = 24  # bytes, which base64 makes 32 characters of: the longest key of a store
_SHOWN: Final = 200  # characters of a name that an error tells


def record_key(*names: str) -> str:
    """Return the key, of 32 characters, of what these names name together.

    It is BLAKE2b of all of them, each after its length, in URL-safe base64. A record keeps its
    names as well: they cannot be had back from the key, and a record is taken for theirs only if
    they are the same.

    Raises:
        InvalidKeyError: one of them is not a string.
    """
    digest = blake2b(digest_size=_DIGEST_SIZE)
    for name in names:
        if not isinstance(name, str):
            raise InvalidKeyError(f"key {name!r}: {type(name).__name__}, allowed is a str")
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return urlsafe_b64encode(digest.digest()).decode()


def refused(
    pairs: Iterable[tuple[str, JSONObject]],
) -> Iterator[tuple[str, JSONObject, InvalidValueError]]:
    """Yield those pairs of a name and a record that no store takes, and why.

    The errors tell of the name; those of a store that was given the records, of a record key.
    """
    for name, record in pairs:
        try:
            encode_value(name if len(name) <= _SHOWN else name[:_SHOWN] + "…", record)
        except InvalidValueError as error:
            yield name, record, error


def open_store(
    path: str | os.PathLike[str], *, max_bytes: int, durable: bool, lock_timeout: float, user: str
) -> KVStore:
    """Open the store at `path` for a class named `user`. Raises as `KVStore`."""
    try:
        return KVStore(path, max_bytes=max_bytes, durable=durable, timeout=lock_timeout)
    except StoreLockedError as error:
        raise StoreLockedError(
            error.args[0],
            f"{user} is for a server of one process: run one worker with threads and no reloader, "
            f"share one {user} between them, or give each process a file of its own; while a "
            f"server is restarted wait for it: lock_timeout=SECONDS",
        ) from None
