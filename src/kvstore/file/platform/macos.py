"""macOS, and any other POSIX system: every change goes through a call that can report a full disk.

APFS copies on write, so nothing that is reserved is overwritten where it is, and nothing is gained
by filling holes. What SEEK_DATA says of them is not asked for: a part that is wrongly taken for one
would be lost.
"""

import fcntl
import mmap
import os
import struct
import sys
from contextlib import suppress
from errno import EINVAL, ENOTSUP, ENOTTY, EOPNOTSUPP
from typing import Final

from .interface import TROUBLE
from .posix import Posix

if sys.platform == "win32":  # for type checkers, which know of POSIX by this
    raise ImportError("Windows is not like this")

# Of file systems other than Apple's own, which may not know how to empty a disk's cache.
_NO_FULL_FLUSH: Final = (ENOTSUP, EOPNOTSUPP, EINVAL, ENOTTY)
# sys/mount.h: the flags and the name of the type in a `struct statfs`; and of the flags, the one of
# what is on this machine.
_STATUS: Final = struct.Struct("64xI4x16s")
_MNT_LOCAL: Final = 0x1000


class MacOS(Posix):
    """macOS."""

    def remote_kind(self, fd: int) -> str:
        if sys.platform == "darwin":
            with suppress(*TROUBLE):
                return remote_kind(_status(fd))
        return ""

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


def remote_kind(status: bytes) -> str:
    """Return the file system's type where macOS does not say of it that it is on this machine."""
    flags, name = _STATUS.unpack_from(status)
    kind: bytes = name.partition(b"\0")[0]
    return "" if flags & _MNT_LOCAL else kind.decode("ascii")


def _status(fd: int) -> bytes:
    """Return what `fstatfs` says of the file system that the file is on."""
    import ctypes  # `os.fstatvfs` leaves out most of the flags

    library = ctypes.CDLL(None, use_errno=True)
    # On Intel the plain name is that of a structure of long ago.
    fstatfs = getattr(library, "fstatfs$INODE64", None) or library.fstatfs
    status = ctypes.create_string_buffer(1 << 14)
    if fstatfs(fd, status):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return status.raw
