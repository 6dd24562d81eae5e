"""What a file holds at the moments when it is flushed, and files made of that."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kvstore.file.platform import system

SECTOR: Final = 512
PAGE: Final = 4096


@contextmanager
def before_each_flush(action: Callable[[], object]) -> Iterator[None]:
    """Do `action` at the start of every flush: what the file holds then is what gets flushed."""
    real, real_of_pages = system.flush_file, system.flush_pages

    def flush(fd: int, mapped: mmap.mmap | None = None) -> None:
        action()
        real(fd, mapped)

    def flush_pages(mapped: mmap.mmap, start: int, end: int) -> None:
        action()
        real_of_pages(mapped, start, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "flush_file", flush)
        patch.setattr(system, "flush_pages", flush_pages)
        yield


def write_image(path: Path, image: bytes) -> Path:
    """Make `image` the contents of a file of its own at `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(image)
    return path
