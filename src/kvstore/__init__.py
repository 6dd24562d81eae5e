"""An embedded, file-based key-value store for one process: see `KVStore`."""

import sys

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
