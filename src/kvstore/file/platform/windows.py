"""Windows: an open file keeps its name, and its length as long as it is mapped.

1. A mapping makes the file as long as it may ever become, and it stays so until it is closed. It is
   made sparse before, so that this takes no room on the disk.
2. What is in use has no holes: it was all written to, so that a full disk refused that.
3. Zeros follow what is in use. Else a file that was closed in order, and could not be cut then,
   would be taken for one that something was appended to.
"""

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from errno import EINVAL, ENOLCK, EPIPE
from typing import Final

from . import win32
from .interface import TROUBLE, System

if sys.platform != "win32":  # for type checkers, which know of Windows by this
    raise ImportError("only Windows is like this")

# Far past the end of any file: Windows keeps others from reading what is locked.
_LOCK_OFFSET: Final = 1 << 40
# So begins the path of what another machine, or a redirector of this one, serves.
_REMOTE: Final = "\\\\?\\UNC\\"


class Windows(System):
    """Windows."""

    flags = os.O_BINARY
    renames_open_files = False

    def lock(self, fd: int) -> bool:
        try:
            return win32.lock_byte(fd, _LOCK_OFFSET)
        except OSError as error:
            raise OSError(ENOLCK, f"the file cannot be locked: {error}") from error

    def unlock(self, fd: int) -> None:
        win32.unlock_byte(fd, _LOCK_OFFSET)

    def is_alive(self, pid: int) -> bool:
        return win32.is_alive(pid)

    def has_no_reader(self, error: OSError) -> bool:
        # The C runtime makes EINVAL of ERROR_NO_DATA, "the pipe is being closed".
        return error.errno in (EPIPE, EINVAL)

    def remote_kind(self, fd: int) -> str:
        with suppress(*TROUBLE):
            if win32.final_path(fd).startswith(_REMOTE):
                return "UNC"
        return ""

    def overwrites_in_place(self, _fd: int) -> bool:
        return True

    def map_file(
        self, fd: int, size: int, mapped_size: int, _private: bool
    ) -> tuple[mmap.mmap, bool]:
        with suppress(*TROUBLE):  # some file systems have no sparse files; they need the room then
            win32.make_sparse(fd)
        try:
            return mmap.mmap(fd, mapped_size), False
        except BaseException:
            self.cut_unmapped(fd, size)
            raise

    def unreserve(self, fd: int, size: int) -> None:
        """What was written are zeros, and the file cannot be cut."""

    def cut(self, fd: int, size: int, end: int) -> None:
        try:
            os.ftruncate(fd, size)
        except OSError:  # it is mapped: by this process, or a virus scanner
            for first, last in self.data_ranges(fd, size, end):
                self.reserve(fd, first, last)

    def cut_unmapped(self, fd: int, size: int) -> None:
        # Where that fails, for a view is still in somebody's hands, the next opening cuts it.
        with suppress(OSError):
            os.ftruncate(fd, size)

    def flush_file(self, fd: int, mapped: mmap.mmap | None = None) -> None:
        if mapped is not None:
            win32.flush_view(mapped)
        os.fsync(fd)

    def data_ranges(self, fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        # What is stored through a map is in there: it was written to before. Flushed first, for
        # nothing says that what the system has yet to write is in its answer.
        try:
            os.fsync(fd)
            ranges = win32.allocated_ranges(fd, start, end)
        except OSError:  # the file system has no sparse files
            ranges = [(start, end)]
        yield from ranges

    def flush_folder(self, path: str) -> None:
        # It cannot be flushed. NTFS has names in its journal, which a flush of the file writes out.
        try:
            fd = os.open(path, os.O_RDWR | self.flags)
        except OSError:  # somebody else keeps it to himself
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
