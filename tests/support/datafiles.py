"""Data files by themselves: opened without an index, looked at, changed, and on a full disk."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kvstore.file.datafile import DataFile
from kvstore.format.layout import EXTENT_SIZE, FIRST_FILE_SIZE, STATE, STATE_FIELDS, STATE_OFFSET
from kvstore.recovery.opening import open_file

from . import MIB
from .components import NOW_MS

FIRST_EXTENTS: Final = FIRST_FILE_SIZE // EXTENT_SIZE
SCRATCH: Final = 7 * EXTENT_SIZE  # a place in a new file where nothing else is


@contextmanager
def opened(path: Path, max_bytes: int = 64 * MIB) -> Iterator[DataFile]:
    """Open the file at `path`, which gets no index, and close it at the end."""
    file = open_file(str(path), max_bytes, 0.0, NOW_MS)
    try:
        yield file
    finally:
        file.require_rebuild()
        file.close()


def state_of(path: Path) -> dict[str, int]:
    """Return the fields of the state on disk, by name."""
    return dict(zip(STATE_FIELDS, STATE.unpack_from(path.read_bytes(), STATE_OFFSET), strict=True))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Write into a file that is not open, as damage does."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@contextmanager
def refusing_disk(
    is_full: Callable[[int, int], bool], number: int = errno.ENOSPC
) -> Iterator[None]:
    """Have the disk refuse to reserve some parts of a file, given by start and end."""
    real = os.posix_fallocate

    def posix_fallocate(fd: int, start: int, size: int, /) -> None:
        if is_full(start, start + size):
            # As the real one may, it leaves a part reserved and the file longer.
            os.ftruncate(fd, max(os.fstat(fd).st_size, start + size // 2))
            raise OSError(number, os.strerror(number))
        real(fd, start, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", posix_fallocate)
        yield
