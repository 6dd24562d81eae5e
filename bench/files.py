"""Files of stores: what they take on the disk, and copies of them with the holes that they have."""

import errno
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path


def allocated(folder: Path) -> int:
    """Return the bytes that the file system has set aside for the files in a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield where the parts of a file that are no holes begin and end."""
    size = os.fstat(descriptor).st_size
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole is left
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def copy_folder(source: Path, target: Path, *, flush: bool) -> None:
    """Copy all files, holes as holes: one of LMDB is gigabytes of these."""
    shutil.copytree(source, target, copy_function=partial(_copy_file, flush=flush))


def _copy_file(source: str, target: str, *, flush: bool) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:
        os.truncate(new.fileno(), os.fstat(old.fileno()).st_size)
        for start, end in data_ranges(old.fileno()):
            os.lseek(new.fileno(), start, os.SEEK_SET)
            done = start
            while done < end:
                done += os.sendfile(new.fileno(), old.fileno(), done, end - done)
        if flush:
            os.fsync(new.fileno())
