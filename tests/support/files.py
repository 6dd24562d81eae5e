"""What is in a file, and how large it is."""

import hashlib
from pathlib import Path


def digest(path: Path) -> str:
    """Return a hash of the file's bytes, also of a store that is open."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(path: Path) -> int:
    """Return the file's length in bytes."""
    return path.stat().st_size
