"""What the operating system is asked to do with an open file, and how that differs between them.

Each function takes a file descriptor. Linux is what is tested; macOS and Windows get what they
have.

What only finds out or chooses a faster way raises nothing, whatever goes wrong in it.
"""

import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import (
    EACCES,
    EBADF,
    EDQUOT,
    EFBIG,
    EINVAL,
    EISDIR,
    ENOSPC,
    ENOSYS,
    ENOTSUP,
    EOPNOTSUPP,
    EPERM,
)
from functools import cache
from typing import Final

from kvstore.errors import QuotaError, StoreFullError
from kvstore.format.layout import EXTENT_SIZE, U64

if sys.platform != "win32":
    import fcntl

# File systems that overwrite reserved blocks where they are.
_IN_PLACE: Final = frozenset({"ext2", "ext3", "ext4", "tmpfs"})
# Of the others, those where a page of a private mapping that was not stored to is the page
# cache's own. POSIX leaves that open; Linux has it so for all that keep files in the page cache.
_PRIVATE: Final = frozenset({"btrfs", "xfs"})
# The disk, a quota, or a limit on the size of files leaves no room.
_NO_ROOM: Final = (ENOSPC, EDQUOT, EFBIG)
# Linux 5.14 and later; `mmap` has no name for it.
_MADV_POPULATE_WRITE: Final = 23
# Said of a folder that cannot be flushed at all.
_NO_FOLDER_FLUSH: Final = frozenset(
    {EACCES, EBADF, EINVAL, EISDIR, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM}
)
# What asking the system for such a thing may end in. Not every Exception: a signal's handler may
# raise one meanwhile.
_TROUBLE: Final = (OSError, ValueError, LookupError, StopIteration, ImportError, AttributeError)
# linux/fs.h
_FS_IOC_GETFLAGS: Final = 0x8008_6601
_FS_IOC_SETFLAGS: Final = 0x4008_6602
_FS_NOCOW_FL: Final = 0x0080_0000
# asm-generic/mman-common.h
_MS_SYNC: Final = 4


def is_full(error: OSError) -> bool:
    """Return whether the system has refused something for want of room on the disk."""
    return error.errno in _NO_ROOM


def raise_if_full(error: OSError, path: str, what: str) -> None:
    """Raise StoreFullError if that is why the system has refused to do `what`."""
    if is_full(error):
        message = f"{path}: no room on the disk to {what}: {error.strerror}"
        kind = QuotaError if error.errno == EDQUOT else StoreFullError
        raise kind(message) from error


def overwrites_in_place(fd: int) -> bool:
    """Return whether the file is on a file system known to overwrite reserved blocks in place."""
    if sys.platform != "linux":
        return os.name == "nt"
    return _file_system(fd) in _IN_PLACE


def may_be_mapped_privately(fd: int) -> bool:
    """Return whether a private mapping is known to show what is written to the file afterwards."""
    return sys.platform == "linux" and _file_system(fd) in _PRIVATE


def _file_system(fd: int) -> str:
    """Return the name of the file system that the file is on; empty where Linux does not tell."""
    # By the number of its mount: of a btrfs, files and mount name different devices. As bytes, for
    # names in there are of any encoding; only blanks and ends of lines are escaped.
    with suppress(*_TROUBLE):
        with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
            wanted = next(line.split()[1] for line in lines if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as mounts:
            for mount in mounts:
                # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
                fields = mount.split(b" ")
                if fields[0] == wanted:
                    return fields[fields.index(b"-") + 1].decode("ascii")
    return ""


def map_file(fd: int, size: int, private: bool) -> tuple[mmap.mmap, bool]:
    """Map the file for reading and writing, privately if wanted and the system has the memory.

    Returns:
        The mapping, and whether it is private.
    """
    if private:
        with suppress(*_TROUBLE):  # the system may count it as memory that could all be needed
            return mmap.mmap(fd, size, access=mmap.ACCESS_COPY), True
    return mmap.mmap(fd, size), False


def limit_of_file_size() -> int | None:
    """Return how many bytes a file of this process may have; None where there is no such limit."""
    return _limits("RLIMIT_FSIZE").get("RLIMIT_FSIZE")


def limits_of_memory() -> str:
    """Return the limits that may keep this process from mapping more, for a message."""
    said = {"RLIMIT_AS": "RLIMIT_AS, ulimit -v", "RLIMIT_MEMLOCK": "RLIMIT_MEMLOCK, ulimit -l"}
    return "; ".join(f"{said[name]}: {limit:,} bytes" for name, limit in _limits(*said).items())


def _limits(*names: str) -> dict[str, int]:
    """Return those of this process's limits that are set, and can be told."""
    with suppress(*_TROUBLE):  # with too little memory, it may not be loaded
        import resource  # for messages of an opening, and where it meets such a limit

        limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
        return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}
    return {}


def read_ahead(mapped: mmap.mmap, wanted: bool) -> None:
    """Tell the system whether what follows a page that is read will be wanted soon.

    Lookups read here and there. Reading ahead for them has the disk busy with what nobody asked
    for, which in little memory pushes out what is needed (measured: a hundredth of the reads a
    second).
    """
    if hasattr(mmap, "MADV_RANDOM"):
        with suppress(*_TROUBLE):
            mapped.madvise(mmap.MADV_NORMAL if wanted else mmap.MADV_RANDOM)


def prefault(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Have the system bring in, all at once, pages of a shared mapping that will be stored to.

    Each that is not there costs a fault as it is first stored to, which takes longer than that of a
    small record. Where the system does not know how, nothing happens.
    """
    if sys.platform == "linux":
        with suppress(*_TROUBLE):
            mapped.madvise(_MADV_POPULATE_WRITE, offset, size)


def disable_copy_on_write(fd: int) -> None:
    """Have btrfs treat an empty file as one that is overwritten in place (``chattr +C``).

    It spares the disk the fragments that small changes would make, and the store the need for room
    to overwrite, as long as no copy or snapshot shares the file's blocks. Records have checksums of
    their own for those that btrfs then leaves out.
    """
    if sys.platform == "linux":
        with suppress(*_TROUBLE):
            flags = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
            (number,) = U64.unpack(flags)
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, U64.pack(number | _FS_NOCOW_FL))


def reserve(fd: int, start: int, end: int) -> None:
    """Have the disk set aside every block of the file from `start` to `end`, growing it to `end`.

    Raises:
        OSError: ENOSPC where it has not that many.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, start, end - start)
            return
        except OSError as error:
            # EPERM: from a filter of system calls, as containers have.
            if error.errno not in (EOPNOTSUPP, EINVAL, ENOSYS, EPERM):
                raise
    size = os.fstat(fd).st_size
    for hole_start, hole_end in [*_holes(fd, start, min(end, size)), (max(start, size), end)]:
        for offset in range(hole_start, hole_end, EXTENT_SIZE):
            write_at(fd, offset, bytes(min(EXTENT_SIZE, hole_end - offset)))


def _holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the holes of a file between two offsets, where the system can tell."""
    for data_start, data_end in _data(fd, start, end):
        if data_start > start:
            yield start, data_start
        start = data_end
    if start < end:
        yield start, end


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file between two offsets that are not holes; all of it if unknown."""
    if not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    while start < end:
        try:
            data_start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == EINVAL:
                yield start, end
            return  # ENXIO: no more data
        data_end = min(os.lseek(fd, data_start, os.SEEK_HOLE), end)
        if data_start < end:
            yield data_start, data_end
        start = data_end


def is_zero(fd: int, size: int) -> bool:
    """Return whether the file holds nothing but zeros. Holes are not read."""
    for start, end in _data(fd, 0, size):
        for offset in range(start, end, EXTENT_SIZE):
            if any(read_at(fd, min(EXTENT_SIZE, end - offset), offset)):
                return False
    return True


def find_last(fd: int, wanted: bytes, start: int, end: int) -> int:
    """Return where these bytes are last between two offsets; -1 where they are not.

    For no bytes: where something else than a zero is. Holes are not read.
    """
    last = -1
    for data_start, data_end in _data(fd, start, end):
        for offset in range(data_start, data_end, EXTENT_SIZE):
            # A little more, for what goes on in the next piece.
            size = min(EXTENT_SIZE + max(len(wanted) - 1, 0), data_end - offset)
            piece = read_at(fd, size, offset)
            found = piece.rfind(wanted) if wanted else len(piece.rstrip(b"\0")) - 1
            last = offset + found if found >= 0 else last
    return last


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Read up to `size` bytes; for before the file is mapped and shared by threads."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


def write_at(fd: int, offset: int, data: bytes) -> None:
    """Write all of `data`; for before the file is mapped and shared by threads."""
    os.lseek(fd, offset, os.SEEK_SET)
    written = os.write(fd, data)
    if written < len(data):
        write_at(fd, offset + written, data[written:])


def flush_file(fd: int, mapped: mmap.mmap | None = None) -> None:
    """Put the file's contents and length on stable storage."""
    # `fdatasync` writes pages dirtied through the map as well on Linux, and lets other threads run;
    # `mmap.flush` keeps the interpreter's lock all the while.
    if sys.platform == "linux":
        os.fdatasync(fd)
        return
    if mapped is not None:
        mapped.flush()
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def flush_pages(mapped: mmap.mmap, start: int, end: int) -> None:
    """Put the pages of a mapped file that hold its bytes from `start` to `end` on stable storage.

    On Linux only. What is relied on is that `msync` with MS_SYNC ends as `fdatasync` of this part
    of the file would: its pages are on stable storage, and so is what it takes to read them back,
    such as that blocks which were only reserved now hold data. (The kernel calls the file system's
    fsync for these pages. ext4 waits for them and for the conversion of their blocks, commits the
    transaction of its journal that has it, and flushes the disk's cache.) It is not relied on for
    the file's length, nor for any other page.

    Needs `can_flush_pages` to have said that it can be done.

    Raises:
        OSError: the disk did not take it.
    """
    # `mmap.flush` would do the same, and keep the interpreter's lock all the while.
    msync, address_of, errno_of = _msync()
    first = start & -mmap.PAGESIZE
    if msync(address_of(mapped) + first, end - first, _MS_SYNC):
        number = errno_of()
        raise OSError(number, os.strerror(number))


def can_flush_pages() -> bool:
    """Load what `flush_pages` needs, and return whether it is there.

    At opening: a flush must not fail for want of what it takes to load a module.
    """
    if sys.platform == "linux":
        with suppress(*_TROUBLE):  # such as a Python without ctypes
            _msync()
            return True
    return False


@cache
def _msync() -> tuple[
    Callable[[int, int, int], int], Callable[[mmap.mmap], int], Callable[[], int]
]:
    """Return the system's msync, what tells the address of a map, and what tells the errno."""
    import ctypes  # a millisecond and a megabyte, which few programs need to spend

    msync = ctypes.CDLL(None, use_errno=True).msync
    msync.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    first_byte = ctypes.c_char.from_buffer

    def address_of(mapped: mmap.mmap) -> int:
        return ctypes.addressof(first_byte(mapped))

    return msync, address_of, ctypes.get_errno


def flush_folder(path: str) -> None:
    """Put the name of a new file on stable storage, where its folder can be flushed.

    Where it cannot, for it may not be read, or its file system does not know how, nothing happens:
    then the name gets there with the file, as far as the file system sees to that.

    Raises:
        OSError: the disk did not take it.
    """
    if os.name == "posix":
        try:
            folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FLUSH:
                raise
