"""What Linux and macOS have in common: POSIX, and locks by portalocker."""

import mmap
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import (
    EACCES,
    EBADF,
    EINVAL,
    EISDIR,
    ENOLCK,
    ENOSYS,
    ENOTSUP,
    EOPNOTSUPP,
    EPERM,
)
from typing import Final

import portalocker

from .interface import TROUBLE, System, do_nothing

if sys.platform == "win32":  # for type checkers, which know of POSIX by this
    raise ImportError("Windows is not like this")

# Said of a folder that cannot be flushed at all.
_NO_FOLDER_FLUSH: Final = frozenset(
    {EACCES, EBADF, EINVAL, EISDIR, ENOSYS, ENOTSUP, EOPNOTSUPP, EPERM}
)


class Posix(System):
    """A system as POSIX describes it.

    A lock is ``flock``: it belongs to the open file description, dies with the process, and can be
    released by an explicit unlock even while a forked child still has a copy of the descriptor.
    """

    flags = os.O_NONBLOCK
    renames_open_files = True

    def lock(self, fd: int) -> bool:
        try:
            portalocker.lock(
                fd, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
            )
        except portalocker.AlreadyLocked:
            return False
        except portalocker.LockException as error:
            raise OSError(ENOLCK, f"the file cannot be locked: {error}") from error
        return True

    def unlock(self, fd: int) -> None:
        portalocker.unlock(fd)

    def is_alive(self, pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except (OSError, OverflowError):
            return False
        return True

    def at_fork(
        self,
        *,
        before: Callable[[], None] = do_nothing,
        after_in_parent: Callable[[], None] = do_nothing,
        after_in_child: Callable[[], None] = do_nothing,
    ) -> None:
        os.register_at_fork(
            before=before, after_in_parent=after_in_parent, after_in_child=after_in_child
        )

    def user_id(self) -> int:
        return os.getuid()

    def map_file(
        self, fd: int, size: int, mapped_size: int, private: bool
    ) -> tuple[mmap.mmap, bool]:
        os.ftruncate(fd, mapped_size)
        try:
            if private:
                with suppress(*TROUBLE):  # the system may count it as memory that could be needed
                    return mmap.mmap(fd, mapped_size, access=mmap.ACCESS_COPY), True
            return mmap.mmap(fd, mapped_size), False
        finally:
            os.ftruncate(fd, size)

    def unreserve(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def cut(self, fd: int, size: int, _end: int) -> None:
        os.ftruncate(fd, size)

    def cut_unmapped(self, fd: int, size: int) -> None:
        """The file had this length while it was mapped."""

    def read_ahead(self, mapped: mmap.mmap, wanted: bool) -> None:
        with suppress(*TROUBLE):
            mapped.madvise(mmap.MADV_NORMAL if wanted else mmap.MADV_RANDOM)

    def limit_of_file_size(self) -> int | None:
        return _limits("RLIMIT_FSIZE").get("RLIMIT_FSIZE")

    def limits_of_memory(self) -> str:
        said = {"RLIMIT_AS": "RLIMIT_AS, ulimit -v", "RLIMIT_MEMLOCK": "RLIMIT_MEMLOCK, ulimit -l"}
        limits = _limits(*said).items()
        return "; ".join(f"{said[name]}: {limit:,} bytes" for name, limit in limits)

    def flush_folder(self, path: str) -> None:
        try:
            folder = os.open(os.path.dirname(os.path.realpath(path)), os.O_RDONLY)
            try:
                self._flush(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FLUSH:
                raise

    def _flush(self, fd: int) -> None:
        """Put a folder, or a file without a map, on stable storage."""
        os.fsync(fd)

    def read_at(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)


def _limits(*names: str) -> dict[str, int]:
    """Return those of this process's limits that are set, and can be told."""
    with suppress(*TROUBLE):  # with too little memory, it may not be loaded
        import resource  # for messages of an opening, and where it meets such a limit

        limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
        return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}
    return {}
