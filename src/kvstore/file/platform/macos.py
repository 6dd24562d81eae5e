"""macOS, and any other POSIX system: every change goes through a call that can report a full disk.

APFS copies on write, so nothing that is reserved is overwritten where it is, and nothing is gained
by filling holes. What SEEK_DATA says of them is not asked for: a part that is wrongly taken for one
would be lost.
"""

import fcntl
import mmap
import os
import sys
from errno import EINVAL, ENOTSUP, ENOTTY, EOPNOTSUPP
from typing import Final

from .posix import Posix

if sys.platform == "win32":  # for type checkers, which know of POSIX by this
    raise ImportError("Windows is not like this")

# Of file systems other than Apple's own, which may not know how to empty a disk's cache.
_NO_FULL_FLUSH: Final = (ENOTSUP, EOPNOTSUPP, EINVAL, ENOTTY)


class MacOS(Posix):
    """macOS."""

    def overwrites_in_place(self, _fd: int) -> bool:
        return False

    def fill_holes(self, fd: int, size: int) -> None:
        """Each write is asked for, and the disk refuses what it has no room for."""

    def flush_file(self, fd: int, _mapped: mmap.mmap | None = None) -> None:
        # All changes are written by calls: there is nothing that only the map knows of.
        self._flush(fd)

    def _flush(self, fd: int) -> None:
        # `fsync` leaves what it has written in the disk's cache.
        full_flush: int | None = getattr(fcntl, "F_FULLFSYNC", None)
        if full_flush is not None:
            try:
                fcntl.fcntl(fd, full_flush)
                return
            except OSError as error:
                if error.errno not in _NO_FULL_FLUSH:
                    raise
        os.fsync(fd)
