"""Linux: what is overwritten in place by file system, blocks set aside by fallocate, and msync."""

import fcntl
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from errno import EINVAL, ENOSYS, EOPNOTSUPP, EPERM
from functools import cache
from typing import Final

from kvstore.format.layout import U64

from .interface import TROUBLE, address_of
from .posix import Posix

if sys.platform != "linux":  # for type checkers, which know of Linux by this
    raise ImportError("only Linux is like this")

# File systems that overwrite reserved blocks where they are.
_IN_PLACE: Final = frozenset({"ext2", "ext3", "ext4", "tmpfs"})
# Of the others, those where a page of a private mapping that was not stored to is the page
# cache's own. POSIX leaves that open; Linux has it so for all that keep files in the page cache.
_PRIVATE: Final = frozenset({"btrfs", "xfs"})
# Those of the network; and those by which a virtual machine, WSL or a container has a folder of the
# machine around it, whose processes no lock keeps out, and whose disk a flush need not reach.
_REMOTE: Final = frozenset(
    {
        *("afs", "beegfs", "ceph", "cifs", "coda", "lustre", "ncpfs", "nfs", "nfs4", "orangefs"),
        *("smb3", "smbfs"),
        *("9p", "fakeowner", "prl_fs", "vboxsf", "virtiofs"),
    }
)
# What a program serves is "fuse" or "fuse.PROGRAM", and nobody can tell from here whether it keeps
# locks and passes flushes on. Not so "fuseblk", of block devices of this machine (NTFS, exFAT); and
# a container without root has its layers, which are files of this machine, by this one.
_LOCAL_FUSE: Final = frozenset({"fuse.fuse-overlayfs"})
# Linux 5.14 and later; `mmap` has no name for it.
_MADV_POPULATE_WRITE: Final = 23
# linux/fs.h
_FS_IOC_GETFLAGS: Final = 0x8008_6601
_FS_IOC_SETFLAGS: Final = 0x4008_6602
_FS_NOCOW_FL: Final = 0x0080_0000
_FICLONE: Final = 0x4004_9409
# asm-generic/mman-common.h
_MS_SYNC: Final = 4


class Linux(Posix):
    """Linux."""

    def is_holder(self, pid: int, fd: int) -> bool:
        # The number may be one of another pid namespace, or of a holder that was killed, and belong
        # to anyone here. So it is asked which files the process has open, and which it has locked.
        wanted = os.fstat(fd)
        with suppress(OSError):  # not there, or another user's
            for name in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):  # closed meanwhile
                    if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                        with open(f"/proc/{pid}/fdinfo/{name}", "rb") as lines:
                            if any(_tells_of_flock(line) for line in lines):
                                return True
        return False

    def remote_kind(self, fd: int) -> str:
        kind = file_system(fd)
        is_fuse = kind.partition(".")[0] == "fuse" and kind not in _LOCAL_FUSE
        return kind if is_fuse or kind in _REMOTE else ""

    def overwrites_in_place(self, fd: int) -> bool:
        return file_system(fd) in _IN_PLACE

    def may_be_mapped_privately(self, fd: int) -> bool:
        return file_system(fd) in _PRIVATE

    def reserve(self, fd: int, start: int, end: int) -> None:
        if not _allocate(fd, start, end):
            super().reserve(fd, start, end)

    def fill_holes(self, fd: int, size: int) -> None:
        if not _allocate(fd, 0, size):
            super().fill_holes(fd, size)

    def prefault(self, mapped: mmap.mmap, offset: int, size: int) -> None:
        with suppress(*TROUBLE):
            mapped.madvise(_MADV_POPULATE_WRITE, offset, size)

    def disable_copy_on_write(self, fd: int) -> None:
        # Of btrfs (``chattr +C``). It spares the disk the fragments that small changes would make,
        # and the store the need for room to overwrite, as long as no copy or snapshot shares the
        # file's blocks. Records have checksums of their own for those that btrfs then leaves out.
        with suppress(*TROUBLE):
            flags = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
            (number,) = U64.unpack(flags)
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, U64.pack(number | _FS_NOCOW_FL))

    def share_blocks(self, fd: int, copy: int) -> bool:
        with suppress(OSError):
            fcntl.ioctl(copy, _FICLONE, fd)
            return True
        # btrfs shares between two files only where both are overwritten in place, or neither.
        self.disable_copy_on_write(copy)
        with suppress(OSError):
            fcntl.ioctl(copy, _FICLONE, fd)
            return True
        return False

    def flush_file(self, fd: int, _mapped: mmap.mmap | None = None) -> None:
        # It writes pages dirtied through the map as well, and lets other threads run; `mmap.flush`
        # keeps the interpreter's lock all the while.
        os.fdatasync(fd)

    def can_flush_pages(self) -> bool:
        with suppress(*TROUBLE):  # such as a Python without ctypes
            _msync()
            return True
        return False

    def flush_pages(self, mapped: mmap.mmap, start: int, end: int) -> None:
        # What is relied on is that `msync` with MS_SYNC ends as `fdatasync` of this part of the
        # file would: its pages are on stable storage, and so is what it takes to read them back,
        # such as that blocks which were only reserved now hold data. (The kernel calls the file
        # system's fsync for these pages. ext4 waits for them and for the conversion of their
        # blocks, commits the transaction of its journal that has it, and flushes the disk's cache.)
        # `mmap.flush` would do the same, and keep the interpreter's lock all the while.
        msync, errno_of = _msync()
        first = start & -mmap.PAGESIZE
        if msync(address_of(mapped) + first, end - first, _MS_SYNC):
            number = errno_of()
            raise OSError(number, os.strerror(number))

    def data_ranges(self, fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
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


def file_system(fd: int) -> str:
    """Return the name of the file system that the file is on; empty where Linux does not tell."""
    # By the number of its mount: of a btrfs, files and mount name different devices. As bytes, for
    # names in there are of any encoding; only blanks and ends of lines are escaped.
    with suppress(*TROUBLE):
        with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
            wanted = next(line.split()[1] for line in lines if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as mounts:
            for mount in mounts:
                # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw
                fields = mount.split(b" ")
                if fields[0] == wanted:
                    return fields[fields.index(b"-") + 1].decode("ascii")
    return ""


def _tells_of_flock(line: bytes) -> bool:
    """Return whether this line of what Linux says of an open file tells of a lock by `flock`."""
    return line.startswith(b"lock:") and b"FLOCK" in line


def _allocate(fd: int, start: int, end: int) -> bool:
    """Have the disk set aside a part of a file, changing nothing in it. False: it cannot.

    Raises:
        OSError: ENOSPC where it has not that much.
    """
    if not hasattr(os, "posix_fallocate"):  # Python built for musl
        return False
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        # EPERM: from a filter of system calls, as containers have.
        if error.errno not in (EOPNOTSUPP, EINVAL, ENOSYS, EPERM):
            raise
        return False
    return True


@cache
def _msync() -> tuple[Callable[[int, int, int], int], Callable[[], int]]:
    """Return the system's msync, and what tells the errno."""
    import ctypes  # a millisecond and a megabyte, which few programs need to spend

    msync = ctypes.CDLL(None, use_errno=True).msync
    msync.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return msync, ctypes.get_errno
