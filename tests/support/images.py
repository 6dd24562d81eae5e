"""What a file holds at the moments when it is flushed, and files made of that."""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

import kvstore.file.platform

SECTOR: Final = 512
PAGE: Final = 4096


@contextmanager
def before_each_flush(action: Callable[[], object]) -> Iterator[None]:
    """Do `action` at the start of every flush: what the file holds then is what gets flushed."""
    real, real_of_pages = os.fdatasync, kvstore.file.platform.system.flush_pages

    def flush(fd: int) -> None:
        action()
        real(fd)

    def flush_pages(mapped: mmap.mmap, start: int, end: int) -> None:
        action()
        real_of_pages(mapped, start, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", flush)
        patch.setattr(kvstore.file.platform.system, "flush_pages", flush_pages)
        yield


def write_image(path: Path, image: bytes) -> Path:
    """Make `image` the contents of a file of its own at `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(image)
    return path
