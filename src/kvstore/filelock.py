"""The exclusive lock on a data file, between processes and within this one.

The lock is portalocker's, on the data file itself. On POSIX that is ``flock``: it belongs to the
open file description, dies with the process, and can be let go by an explicit unlock even while a
forked child still has a copy of the descriptor. A child closes its copies as it is born, so that it
does not keep the lock of a parent that was killed.

Invariants:
1. `_held` names every file that this process has locked, by device and inode.
2. `_held` is read and changed under `_guard` only, which is taken last of all locks.
3. A descriptor with the lock is open only while `_held` names it, or under `_guard`. A fork waits
   for the guard, so a child knows every descriptor that it has to close.
"""

import os
import stat
import threading
from collections.abc import Callable
from errno import EINVAL, ENOLCK, ENOSPC, ESTALE
from time import monotonic, sleep
from typing import Final
from weakref import WeakMethod, WeakValueDictionary

import portalocker

from .errors import StoreBusyError, StoreFullError, StoreLockedError
from .implementation import Lock
from .layout import FILE_MAGIC, HOLDER, HOLDER_OFFSET
from .reentry import begin_inside, forget_others, is_inside, leave, thread, waiting

_POLL_SECONDS: Final = 0.02
_COMMON_FLAGS: Final = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS: Final = os.O_RDWR | _COMMON_FLAGS

_guard = Lock()


class _Forks(threading.local):
    """Whether each fork that this thread is at, the innermost last, has taken the guard."""

    def __init__(self) -> None:
        self.taken: list[bool] = []


_forks = _Forks()
# Weak: one that an interrupt let no one keep, lets go of the file as it is collected.
_held: "WeakValueDictionary[tuple[int, int], FileLock]" = WeakValueDictionary()


class FileLock:
    """An exclusively locked, open data file. Creates the file, mode 0600, where it is missing.

    Args:
        path: absolute path of the file.
        timeout: seconds to wait for another process.
        read_only: open it for reading only, and do not create it.

    Raises:
        StoreLockedError: another process has it after `timeout`, or this one has it already.
        StoreFullError: the file is missing, and the disk has no room to create it.
        OSError: the path cannot be opened, or is no regular file.
    """

    def __init__(self, path: str, timeout: float, *, read_only: bool = False) -> None:
        self.path = path
        self.fd = -1
        self._pid = os.getpid()
        self._flags = os.O_RDONLY | _COMMON_FLAGS if read_only else _FLAGS | os.O_CREAT
        self._after_fork: WeakMethod[Callable[[], None]] | None = None
        deadline = monotonic() + timeout
        while not self._try(deadline):
            sleep(max(0.0, min(_POLL_SECONDS, deadline - monotonic())))

    def _try(self, deadline: float) -> bool:
        """Open and lock the file. False: try again, somebody else has it or has just moved it.

        Raises:
            StoreBusyError: this thread was interrupted as it opened or closed another one.
        """
        if is_inside():
            if _guard._is_owned():
                raise StoreBusyError(
                    f"{self.path}: this thread is opening or closing a store already, and was "
                    f"interrupted there; try again once that has ended"
                )
            begin_inside(self.path)
        try:
            return self._try_alone(deadline)
        finally:
            if waiting:
                leave()

    def _try_alone(self, deadline: float) -> bool:
        with thread.inside, _guard:
            try:
                self.fd = os.open(self.path, self._flags, 0o600)
            except OSError as error:
                if error.errno == ENOSPC:
                    raise StoreFullError(
                        f"{self.path}: no room on the disk to create the file: {error.strerror}"
                    ) from error
                raise
            try:
                status = os.fstat(self.fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(EINVAL, "not a regular file", self.path)
                self._identity = (status.st_dev, status.st_ino)
                locked = self._lock(deadline)
            except BaseException:
                self._close()
                raise
            if not locked:
                self._close()
            return locked

    def _lock(self, deadline: float) -> bool:
        """Lock the open file, if it is free and still at its path. The caller holds the guard."""
        if self._identity in _held:
            raise StoreLockedError(
                f"{self.path}: this very process (pid {os.getpid()}) has it open"
            )
        try:
            portalocker.lock(
                self.fd, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
            )
        except portalocker.AlreadyLocked:
            if monotonic() < deadline:
                return False
            raise StoreLockedError(
                f"{self.path}: {_holder(self.fd)} has it open; one process at a time may"
            ) from None
        except portalocker.LockException as error:
            raise OSError(ENOLCK, f"the file cannot be locked: {error}", self.path) from error
        # Whoever had it may have unlinked or replaced it between our open and our lock.
        if self._path_names_it():
            _held[self._identity] = self
            return True
        portalocker.unlock(self.fd)
        return False

    def is_held_here(self) -> bool:
        """Return whether this very thread is at opening or closing some file."""
        return _guard._is_owned()

    def open_again(self) -> int:
        """Return a second descriptor of the file, whose copies do not hold the lock."""
        fd = os.open(self.path, _FLAGS)
        if not os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
            os.close(fd)
            raise OSError(ESTALE, "the file was replaced while it was being opened", self.path)
        return fd

    def call_after_fork(self, method: Callable[[], None]) -> None:
        """Have a forked child call this bound method. It does not keep its object alive."""
        self._after_fork = WeakMethod(method)

    @property
    def is_parents(self) -> bool:
        """Whether this is a forked child, and its parent the one that has the lock."""
        return self._pid != os.getpid()

    def check_path(self) -> None:
        """Raise OSError where the path no longer names the open file."""
        if not self._path_names_it():
            raise OSError(
                ESTALE, "the file was removed or replaced while the store had it open", self.path
            )

    def _path_names_it(self) -> bool:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def release(self) -> None:
        """Let go of the lock. Idempotent; does nothing in a forked child."""
        with thread.inside, _guard:
            if _held.get(self._identity) is self:
                try:
                    if self.fd >= 0:
                        portalocker.unlock(self.fd)
                finally:
                    try:
                        self._close()
                    finally:
                        del _held[self._identity]

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        # Forgotten first: the number may be another file's by the time of a second call.
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)


def _holder(fd: int) -> str:
    """Return what can be said of the process that holds the lock on this open file."""
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        head = os.read(fd, HOLDER_OFFSET + HOLDER.size)
    except OSError:  # Windows keeps the locked bytes from being read
        return "another process"
    if len(head) == HOLDER_OFFSET + HOLDER.size and head.startswith(FILE_MAGIC):
        (pid,) = HOLDER.unpack_from(head, HOLDER_OFFSET)
        if pid and is_alive(pid):
            return f"process {pid}"
    return "another process"


def is_alive(pid: int) -> bool:
    """Tell a holder's number from one that a killed holder left behind."""
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _hold_guard() -> None:
    """Before a fork: wait until no other thread is at opening or closing a locked descriptor."""
    _forks.taken.append(not _guard._is_owned())
    if _forks.taken[-1]:
        _guard.acquire()


def _let_go_of_guard() -> None:
    if _forks.taken.pop():
        _guard.release()


def _forget_in_child() -> None:
    """In a forked child: give up the parent's locks without releasing them, and tell the owners."""
    global _guard
    _let_go_of_guard()
    _guard = Lock()
    forget_others()
    locks = list(_held.values())
    _held.clear()
    for lock in locks:
        lock._close()
        owner = lock._after_fork and lock._after_fork()
        if owner is not None:
            owner()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_guard, after_in_parent=_let_go_of_guard, after_in_child=_forget_in_child
    )
