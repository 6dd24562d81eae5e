"""What is in a file, how large it is, and one byte of it changed."""

import hashlib
import os
import stat
from pathlib import Path

from kvstore import KVStore

from .platforms import PLATFORM


def digest(path: Path) -> str:
    """Return a hash of the file's bytes, also of a store that is open."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> int:
    """Return the file's length in bytes."""
    return path.stat().st_size


def open_size(store: KVStore) -> int:
    """Return the length in bytes of an open store's file: on Windows, of what is in use of it.

    There it is as long as it may become, until it is closed.
    """
    return store._file.size if PLATFORM == "win32" else size(store.path)


def open_contents(store: KVStore) -> bytes:
    """Return what is in an open store's file: on Windows, without the zeros past what is in use."""
    return store.path.read_bytes()[: open_size(store)]


def is_private(path: Path) -> bool:
    """Return whether a file is its owner's alone, as far as its mode tells: Windows has none."""
    return os.name != "posix" or stat.S_IMODE(path.stat().st_mode) == 0o600


def change_byte(path: Path, offset: int, mask: int = 0xFF) -> None:
    """Flip the bits of `mask` in one byte of a closed file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))
