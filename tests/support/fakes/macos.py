"""macOS, as far as a store notices it.

Imitated, by what Apple's manual pages say:

- There is no `posix_fallocate` and no `fdatasync` (Python's documentation of `os`: "Availability:
  Unix", where the C library has them; Apple's has not).
- SEEK_DATA and SEEK_HOLE of lseek(2) tell of what the file system keeps, which need not be what was
  written a moment ago: all that is not flushed may be said to be a hole. Here everything is.
- F_FULLFSYNC of fcntl(2) "is currently implemented on HFS, MS-DOS (FAT), Universal Disk Format
  (UDF) and APFS file systems": on others it fails with ENOTSUP. Here it does on all.

That changes go by `pwrite`, the store decides by itself there, for APFS copies on write.
"""

import fcntl
import os
from errno import ENOTSUP, ENXIO
from typing import Any, Final

_MISSING: Final = ("fdatasync", "posix_fadvise", "posix_fallocate")
_F_FULLFSYNC: Final = 51  # sys/fcntl.h

_lseek, _fcntl = os.lseek, fcntl.fcntl


def install() -> None:
    """Have this process run on macOS from now on, as far as a store notices."""
    for name in _MISSING:
        if hasattr(os, name):
            delattr(os, name)
    setattr(fcntl, "F_FULLFSYNC", _F_FULLFSYNC)  # noqa: B010 - a plain assignment is no valid typing
    setattr(fcntl, "fcntl", _refuse_full_flush)  # noqa: B010 - likewise
    setattr(os, "lseek", _seek_no_data)  # noqa: B010 - likewise


def _seek_no_data(fd: int, position: int, whence: int, /) -> int:
    if whence == os.SEEK_DATA:
        raise OSError(ENXIO, "no data, as far as is known")
    if whence == os.SEEK_HOLE:
        return position
    return _lseek(fd, position, whence)


def _refuse_full_flush(fd: int, command: int, argument: Any = 0, /) -> Any:
    if command == _F_FULLFSYNC:
        raise OSError(ENOTSUP, "as a file system other than Apple's own")
    return _fcntl(fd, command, argument)
