"""What a file holds at the moments when it is flushed, and files made of that."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

SECTOR: Final = 512
PAGE: Final = 4096


@contextmanager
def before_each_flush(action: Callable[[], object]) -> Iterator[None]:
    """Do `action` at the start of every flush: what the file holds then is what gets flushed."""
    real = os.fdatasync

    def flush(fd: int) -> None:
        action()
        real(fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdatasync", flush)
        yield


def write_image(path: Path, image: bytes) -> Path:
    """Make `image` the contents of a file of its own at `path`."""
    path.unlink(missing_ok=True)
    path.write_bytes(image)
    return path
