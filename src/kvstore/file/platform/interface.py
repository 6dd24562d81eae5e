"""What the store asks of an operating system, and what is done alike on all of them.

What only finds out or chooses a faster way raises nothing, whatever goes wrong in it.
"""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from errno import EDQUOT, EFBIG, ENOSPC
from typing import Final

from kvstore.errors import QuotaError, StoreFullError
from kvstore.format.layout import EXTENT_SIZE

# What asking the system for such a thing may end in. Not every Exception: a signal's handler may
# raise one meanwhile.
TROUBLE: Final = (OSError, ValueError, LookupError, StopIteration, ImportError, AttributeError)
# The disk, a quota, or a limit on the size of files leaves no room.
_NO_ROOM: Final = (ENOSPC, EDQUOT, EFBIG)


def is_full(error: OSError) -> bool:
    """Return whether the system has refused something for want of room on the disk."""
    return error.errno in _NO_ROOM


def raise_if_full(error: OSError, path: str, what: str) -> None:
    """Raise StoreFullError if that is why the system has refused to do `what`."""
    if is_full(error):
        message = f"{path}: no room on the disk to {what}: {error.strerror}"
        kind = QuotaError if error.errno == EDQUOT else StoreFullError
        raise kind(message) from error


def address_of(mapped: mmap.mmap) -> int:
    """Return where in memory a mapping begins."""
    import ctypes  # a millisecond and a megabyte, which few programs need to spend

    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def do_nothing() -> None:
    """Nothing is to be done at this moment of a fork."""


class System(ABC):
    """An operating system. Its methods take the descriptor of an open file, `fd`.

    Attributes:
        flags: for `os.open`, besides whether it is to read or to write.
        renames_open_files: a file may be removed, renamed and replaced while it is open.
    """

    flags: int
    renames_open_files: bool

    # --- who has the file -------------------------------------------------------------------------

    @abstractmethod
    def lock(self, fd: int) -> bool:
        """Lock the file for this descriptor alone. False: somebody else has it locked.

        The lock ends with `unlock` and with the process, and keeps nobody from reading.

        Raises:
            OSError: ENOLCK where the file cannot be locked at all.
        """

    @abstractmethod
    def unlock(self, fd: int) -> None:
        """Release the lock."""

    @abstractmethod
    def is_alive(self, pid: int) -> bool:
        """Return whether there is such a process: a holder's number, or what a killed one left."""

    def is_holder(self, pid: int, _fd: int) -> bool:
        """Return whether process `pid` is the one that has locked the file, as far as is told."""
        return self.is_alive(pid)

    def at_fork(
        self,
        *,
        before: Callable[[], None] = do_nothing,
        after_in_parent: Callable[[], None] = do_nothing,
        after_in_child: Callable[[], None] = do_nothing,
    ) -> None:
        """Have these called whenever this process forks, which it may be unable to."""

    def user_id(self) -> int | None:
        """Return the number of the user whom files belong to; None where they have no such one."""
        return None

    def has_no_reader(self, error: OSError) -> bool:
        """Return whether a stream could not be written since nobody reads the pipe any more."""
        return isinstance(error, BrokenPipeError)

    def remote_kind(self, _fd: int) -> str:
        """Return the type of the file system, if another machine or program is known to serve it.

        Else nothing; nor for one that is stacked on others without saying on which.
        """
        return ""

    # --- mapping, growing and cutting -------------------------------------------------------------

    @abstractmethod
    def overwrites_in_place(self, fd: int) -> bool:
        """Return whether the file system is known to overwrite reserved blocks where they are."""

    def may_be_mapped_privately(self, _fd: int) -> bool:
        """Return whether a private mapping is known to show what is written to the file later."""
        return False

    @abstractmethod
    def map_file(
        self, fd: int, size: int, mapped_size: int, private: bool
    ) -> tuple[mmap.mmap, bool]:
        """Map a file of `size` bytes to read and write, as far as it may ever become.

        Pages past what is reserved are not to be touched.

        Returns:
            The mapping, and whether it is private: if wanted, and the system has the memory.

        Raises:
            OSError: as `is_full` tells, the file cannot become that long; or it cannot be mapped.
                It has `size` bytes then.
        """

    def reserve(self, fd: int, start: int, end: int) -> None:
        """Have the disk set aside what follows `start`, the end of what is in use, up to `end`.

        Zeros are there then.

        Raises:
            OSError: ENOSPC where it has not that much; `unreserve` is to be called.
        """
        zeros = bytes(EXTENT_SIZE)
        for offset in range(start, end, EXTENT_SIZE):
            self.write_at(fd, offset, zeros[: end - offset])

    @abstractmethod
    def unreserve(self, fd: int, size: int) -> None:
        """Give back what was set aside past `size`, where nobody has stored anything."""

    def fill_holes(self, fd: int, size: int) -> None:
        """Have the disk set aside all of a file's first `size` bytes, before it is mapped.

        Nothing happens where holes are not known of.

        Raises:
            OSError: ENOSPC where it has not that much.
        """
        start = 0
        for data_start, data_end in [*self.data_ranges(fd, 0, size), (size, size)]:
            for offset in range(start, data_start, EXTENT_SIZE):
                # Read first: what is wrongly said to be a hole would be lost.
                piece = self.read_at(fd, min(EXTENT_SIZE, data_start - offset), offset)
                if not piece.strip(b"\0"):
                    self.write_at(fd, offset, piece)
            start = data_end

    @abstractmethod
    def cut(self, fd: int, size: int, end: int) -> None:
        """Shorten a file to `size` bytes, with what is in it up to `end` gone for good.

        Where it cannot be cut since it is mapped, zeros are written there.

        Raises:
            OSError: the disk did not take it.
        """

    @abstractmethod
    def cut_unmapped(self, fd: int, size: int) -> None:
        """Give a file that is no longer mapped the length of what is in use, if it has not."""

    def read_ahead(self, mapped: mmap.mmap, wanted: bool) -> None:
        """Tell the system whether what follows a page that is read will be wanted soon.

        Lookups read here and there. Reading ahead for them has the disk busy with what nobody
        asked for, which in little memory pushes out what is needed (measured: a hundredth of the
        reads a second).
        """

    def prefault(self, mapped: mmap.mmap, offset: int, size: int) -> None:
        """Have the system bring in, all at once, pages of a shared mapping that will be stored to.

        Each that is not there costs a fault as it is first stored to, which takes longer than that
        of a small record. Where the system does not know how, nothing happens.
        """

    def disable_copy_on_write(self, fd: int) -> None:
        """Have an empty file be overwritten in place from now on, where that can be asked for."""

    def share_blocks(self, _fd: int, _copy: int) -> bool:
        """Make of an empty file a copy of another, which shares its blocks. False: it cannot be."""
        return False

    def limit_of_file_size(self) -> int | None:
        """Return how many bytes a file of this process may have; None where there is no limit."""
        return None

    def limits_of_memory(self) -> str:
        """Return the limits that may keep this process from mapping more, for a message."""
        return ""

    # --- flushing ---------------------------------------------------------------------------------

    @abstractmethod
    def flush_file(self, fd: int, mapped: mmap.mmap | None = None) -> None:
        """Put the file's contents and length on stable storage, with what its map was stored to."""

    def can_flush_pages(self) -> bool:
        """Load what `flush_pages` needs, and return whether it is there.

        At opening: a flush must not fail for want of what it takes to load a module.
        """
        return False

    def flush_pages(self, mapped: mmap.mmap, start: int, end: int) -> None:
        """Put pages of a mapped file that hold its bytes from `start` to `end` on stable storage.

        Needs `can_flush_pages` to have said that it can be done. The file's length and any other
        page may stay behind.

        Raises:
            OSError: the disk did not take it.
        """
        raise NotImplementedError

    @abstractmethod
    def flush_folder(self, path: str) -> None:
        """Put the name of a new file on stable storage, where its folder can be flushed.

        Where it cannot, for it may not be read, or its file system does not know how, nothing
        happens: then the name gets there with the file, as far as the file system sees to that.

        Raises:
            OSError: the disk did not take it.
        """

    # --- reading and writing ----------------------------------------------------------------------

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes; for before the file is shared by threads."""
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)

    def write_at(self, fd: int, offset: int, data: bytes) -> None:
        """Write all of `data`; for before the file is shared by threads, or under a lock."""
        os.lseek(fd, offset, os.SEEK_SET)
        written = os.write(fd, data)
        if written < len(data):
            self.write_at(fd, offset + written, data[written:])

    def data_ranges(self, _fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a file between two offsets that are no holes; all if unknown."""
        yield start, end

    def is_zero(self, fd: int, size: int) -> bool:
        """Return whether the file holds nothing but zeros. Holes are not read."""
        for start, end in self.data_ranges(fd, 0, size):
            for offset in range(start, end, EXTENT_SIZE):
                if self.read_at(fd, min(EXTENT_SIZE, end - offset), offset).strip(b"\0"):
                    return False
        return True

    def find_last(self, fd: int, wanted: bytes, start: int, end: int) -> int:
        """Return where these bytes are last between two offsets; -1 where they are not.

        For no bytes: where something else than a zero is. Holes are not read.
        """
        last = -1
        for data_start, data_end in self.data_ranges(fd, start, end):
            for offset in range(data_start, data_end, EXTENT_SIZE):
                # A little more, for what goes on in the next piece.
                size = min(EXTENT_SIZE + max(len(wanted) - 1, 0), data_end - offset)
                piece = self.read_at(fd, size, offset)
                found = piece.rfind(wanted) if wanted else len(piece.rstrip(b"\0")) - 1
                last = offset + found if found >= 0 else last
        return last
