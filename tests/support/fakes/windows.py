"""Windows, as far as a store notices it.

Imitated, by what Microsoft's documentation says:

- A file that is mapped cannot be cut: SetEndOfFile fails with ERROR_USER_MAPPED_FILE ("The
  requested operation cannot be performed on a file with a user-mapped section open"), which the C
  runtime's `_chsize_s` makes EACCES. A mapping that is longer than the file makes it longer:
  CreateFileMapping, "if this parameter specifies a size larger than the size of the current file on
  disk, the file size is increased".
- What one handle has locked, another may neither read nor write, of whatever process: LockFileEx,
  "an exclusive lock denies all other processes both read and write access"; `_read` makes
  ERROR_LOCK_VIOLATION EACCES.
- A file that is open without FILE_SHARE_DELETE, as Python and the C runtime open all, or mapped,
  cannot be removed, renamed or replaced: DeleteFile and MoveFileEx ask for that access, and fail
  with ERROR_SHARING_VIOLATION, EACCES as well. `os.rename` replaces nothing.
- Of Python's `os` and other modules there is not what its documentation says is "Availability:
  Unix". `os.kill(pid, 0)` sends CTRL_C_EVENT, and asks nothing.

Not imitated: signals, modes and owners, names of files, links, text modes, what other processes
have open, and the room that a mapping takes where it is not sparse.
"""

import fcntl
import mmap
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EACCES, EINVAL
from types import ModuleType
from typing import Any, Final, Self, cast
from weakref import WeakSet

_MISSING: Final = (
    "fdatasync",
    "fork",
    "forkpty",
    "mkfifo",
    "posix_fadvise",
    "posix_fallocate",
    "pread",
    "preadv",
    "pwrite",
    "pwritev",
    "register_at_fork",
    "O_NONBLOCK",
    "SEEK_DATA",
    "SEEK_HOLE",
)
_SEEK_DATA, _SEEK_HOLE = os.SEEK_DATA, os.SEEK_HOLE
_REAL: Final = {
    name: getattr(os, name)
    for name in ("ftruncate", "kill", "read", "remove", "rename", "replace", "unlink", "write")
}

Identity = tuple[int, int]

# What is locked, by file: the first byte, how many, and by which descriptor.
_locks: Final[dict[Identity, tuple[int, int, int]]] = {}
_maps: "Final[WeakSet[_Map]]" = WeakSet()


def install() -> None:
    """Have this process run on Windows from now on, as far as a store notices."""
    for name in _MISSING:
        if hasattr(os, name):
            delattr(os, name)
    for name, function in _CHANGED.items():
        setattr(os, name, function)
    setattr(os, "O_BINARY", 0)  # noqa: B010 - a plain assignment is no valid typing
    for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
        delattr(mmap, name)
    setattr(mmap, "mmap", _Map)  # noqa: B010 - likewise
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules.update({name: cast("ModuleType", None)})  # so that it cannot be imported
    sys.modules["kvstore.file.platform.win32"] = _win32()


def _win32() -> ModuleType:
    """Return what stands for the module that calls Windows."""
    module = ModuleType("kvstore.file.platform.win32")
    for function in (
        lock_byte,
        unlock_byte,
        make_sparse,
        allocated_ranges,
        flush_view,
        final_path,
        is_alive,
    ):
        setattr(module, function.__name__, function)
    return module


def _identity(fd: int) -> Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _refusal(path: object) -> PermissionError:
    return PermissionError(EACCES, "as Windows refuses it", path)


# --- what is mapped ------------------------------------------------------------------------------


class _Map(mmap.mmap):
    def __new__(
        cls,
        fileno: int,
        length: int,
        tagname: str | None = None,
        access: int = mmap.ACCESS_DEFAULT,
        offset: int = 0,
    ) -> Self:
        if fileno != -1 and offset + length > os.fstat(fileno).st_size:
            if access == mmap.ACCESS_READ:
                raise PermissionError(EACCES, "a mapping to read does not make a file longer")
            _REAL["ftruncate"](fileno, offset + length)
        mapped = super().__new__(cls, fileno, length, access=access, offset=offset)
        mapped.identity = _identity(fileno) if fileno != -1 else (0, 0)
        _maps.add(mapped)
        return mapped

    identity: Identity

    @property
    def madvise(self) -> Any:
        raise AttributeError("madvise")


def _ftruncate(fd: int, length: int, /) -> None:
    status = os.fstat(fd)
    identity = status.st_dev, status.st_ino
    if length < status.st_size and any(
        each.identity == identity and not each.closed for each in _maps
    ):
        raise _refusal(None)
    _REAL["ftruncate"](fd, length)


# --- what is open --------------------------------------------------------------------------------


def _check_not_open(path: Any, folder: int | None) -> None:
    """Raise where a file has an open descriptor here. That of a mapping is one as well."""
    with suppress(FileNotFoundError, NotADirectoryError):
        wanted = os.stat(path, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(wanted.st_mode):
            return
        if any(_is(int(name), wanted) for name in os.listdir("/proc/self/fd")):
            raise _refusal(path)


def _is(fd: int, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), wanted)
    except OSError:  # that by which they are listed
        return False


def _unless_open(name: str) -> Callable[..., None]:
    def remove(path: Any, *, dir_fd: int | None = None) -> None:
        _check_not_open(path, dir_fd)
        _REAL[name](path, dir_fd=dir_fd)

    return remove


def _renaming(name: str) -> Callable[..., None]:
    def rename(
        source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        _check_not_open(source, src_dir_fd)
        _check_not_open(target, dst_dir_fd)
        if name == "rename" and os.path.lexists(target):
            raise FileExistsError(f"{target}: os.rename replaces nothing on Windows")
        _REAL[name](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    return rename


# --- what is locked ------------------------------------------------------------------------------


def lock_byte(fd: int, offset: int) -> bool:
    """Lock a byte: between processes by `flock`, which as LockFileEx does is the handle's."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _locks[_identity(fd)] = (offset, 1, fd)
    return True


def unlock_byte(fd: int, offset: int) -> None:
    assert _locks.pop(_identity(fd)) == (offset, 1, fd)
    fcntl.flock(fd, fcntl.LOCK_UN)


def _check_not_locked(fd: int, size: int) -> None:
    position = start = count = 0
    owner = fd
    if _locks:
        with suppress(OSError):  # it is a pipe, or not open
            start, count, owner = _locks.get(_identity(fd), (0, 0, fd))
            position = os.lseek(fd, 0, os.SEEK_CUR)
    if owner != fd and position < start + count and start < position + size:
        raise _refusal(None)


def _read(fd: int, size: int, /) -> bytes:
    _check_not_locked(fd, size)
    data: bytes = _REAL["read"](fd, size)
    return data


def _write(fd: int, data: bytes, /) -> int:
    _check_not_locked(fd, len(data))
    written: int = _REAL["write"](fd, data)
    return written


# --- the rest ------------------------------------------------------------------------------------


def make_sparse(fd: int) -> None:
    """All files are, on this machine."""


def allocated_ranges(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    ranges = []
    with suppress(OSError):  # ENXIO: there are no more
        while start < end:
            first = os.lseek(fd, start, _SEEK_DATA)
            start = min(os.lseek(fd, first, _SEEK_HOLE), end)
            if first < end:
                ranges.append((first, start))
    return ranges


def flush_view(mapped: mmap.mmap) -> None:
    """The page cache is one with what is mapped."""


def final_path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def is_alive(pid: int) -> bool:
    try:
        _REAL["kill"](pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _kill(pid: int, number: int, /) -> None:
    if number == 0:
        raise OSError(EINVAL, "would be CTRL_C_EVENT on Windows")
    _REAL["kill"](pid, number)


_CHANGED: Final[dict[str, Callable[..., Any]]] = {
    "ftruncate": _ftruncate,
    "kill": _kill,
    "read": _read,
    "remove": _unless_open("remove"),
    "rename": _renaming("rename"),
    "replace": _renaming("replace"),
    "unlink": _unless_open("unlink"),
    "write": _write,
}
