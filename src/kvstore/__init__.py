"""An embedded, file-based key-value store for one process: see `KVStore`.

>>> from kvstore import KVStore
>>> with KVStore("data.kvs") as store:
...     store.put("user:1", {"name": "Ada"})
"""

import sys

try:
    from _thread import _is_main_interpreter  # type: ignore[attr-defined]
except ImportError:  # Python 3.11

    def _is_main_interpreter() -> bool:
        try:
            import _xxsubinterpreters as interpreters  # type: ignore[import-not-found]
        except ImportError:  # a Python without any
            return True
        return bool(interpreters.get_current() == interpreters.get_main())


if not _is_main_interpreter():
    raise ImportError(
        "kvstore works in the main interpreter of a process, and this is a sub-interpreter: import "
        "it in the main one, or in a process of its own"
    )
if sys.byteorder != "little" or sys.maxsize < 2**63 - 1:
    raise ImportError(
        f"kvstore needs a 64-bit, little-endian Python; this one is {sys.byteorder}-endian with "
        f"a largest index of {sys.maxsize}"
    )

from .compiled import IMPLEMENTATION
from .errors import (
    CorruptStoreError,
    InvalidKeyError,
    InvalidTTLError,
    InvalidValueError,
    KeyExistsError,
    KeyNotFoundError,
    KVStoreError,
    StoreBusyError,
    StoreClosedError,
    StoreFullError,
    StoreLockedError,
    UnsupportedFormatError,
    ValueTooLargeError,
)
from .index.stats import StoreStats
from .store import KVStore

__version__ = "0.2.0.dev0"

__all__ = [
    "IMPLEMENTATION",
    "CorruptStoreError",
    "InvalidKeyError",
    "InvalidTTLError",
    "InvalidValueError",
    "KVStore",
    "KVStoreError",
    "KeyExistsError",
    "KeyNotFoundError",
    "StoreBusyError",
    "StoreClosedError",
    "StoreFullError",
    "StoreLockedError",
    "StoreStats",
    "UnsupportedFormatError",
    "ValueTooLargeError",
]
