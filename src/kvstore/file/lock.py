"""The exclusive lock on a data file, between processes and within this one.

The lock is on the data file itself, and dies with the process: see `System.lock`. A child of a fork
closes its copies of the descriptors as it is born, so that it does not keep the lock of a parent
that was killed.

Invariants:
1. `_held` names every file that this process has locked, by device and inode.
2. `_held` is read and changed under `_guard` only, which is taken last of all locks.
3. A descriptor with the lock is open only while `_held` names it, or under `_guard`. A fork waits
   for the guard, so a child knows every descriptor that it has to close.
"""

import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from errno import EINVAL, ELOOP, ENOENT, ENOSPC, ENOTDIR, ESTALE
from threading import get_ident
from time import monotonic, sleep
from typing import Final, NoReturn, SupportsIndex
from weakref import WeakMethod, WeakValueDictionary

from kvstore.compiled import Lock
from kvstore.errors import StoreBusyError, StoreFullError, StoreLockedError
from kvstore.format.layout import FILE_MAGIC, HOLDER, HOLDER_OFFSET

from .caller import levels_to_caller
from .platform import system
from .reentry import begin_inside, forget_others, is_inside, leave, thread, waiting

_POLL_SECONDS: Final = 0.02
_FLAGS: Final = os.O_RDWR | system.flags
# What tells that nothing is at a path. Anything else only tells that this process cannot look.
_ABSENT: Final = (ENOENT, ENOTDIR, ELOOP)
_WHAT_TO_DO: Final = "have that one close it, or wait for it: timeout=SECONDS"

_guard = Lock()


# Threads that hold the guard for a fork.
_forking: set[int] = set()
# Weak: one that an interrupt let no one keep, lets go of the file as it is collected.
_held: "WeakValueDictionary[tuple[int, int], FileLock]" = WeakValueDictionary()


class FileLock:
    """An exclusively locked, open data file. Creates the file, mode 0600, where that is wanted.

    Args:
        path: absolute path of the file.
        timeout: seconds to wait for another process.
        read_only: open it for reading only, and do not create it.
        create: create it where it is missing.

    Raises:
        StoreLockedError: another process has it after `timeout`, or this one has it already.
        StoreFullError: the file is missing, and the disk has no room to create it.
        OSError: the path cannot be opened, or is no regular file.
    """

    fd = -1

    def __init__(
        self, path: str, timeout: float, *, read_only: bool = False, create: bool = True
    ) -> None:
        self.path = path
        self._pid = os.getpid()
        self._timeout = timeout
        self._flags = os.O_RDONLY | system.flags if read_only else _FLAGS
        self._creates = create and not read_only
        self._is_new = self._is_to_remove = False
        self._opener = _caller()
        self._root = _root(path)
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
                self._open()
            except BlockingIOError:
                # The system has told whoever has the lease to give it up, and so it does each time.
                if monotonic() < deadline:
                    return False
                raise StoreLockedError(
                    f"{self.path}: somebody has a lease on it (F_SETLEASE, as file servers take) "
                    f"and has not given it up{self._after_waiting()}",
                    _WHAT_TO_DO,
                ) from None
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

    def _open(self) -> None:
        """Open the file; create it where it is missing, and keep in mind that it was."""
        self._is_new = False
        try:
            self.fd = os.open(self.path, self._flags)
        except FileNotFoundError:
            if not self._creates:
                raise
            try:
                self.fd = os.open(self.path, self._flags | os.O_CREAT | os.O_EXCL, 0o600)
                self._is_new = True
            except FileExistsError:  # by now; or as a link to where nothing is
                self.fd = os.open(self.path, self._flags | os.O_CREAT, 0o600)

    def _lock(self, deadline: float) -> bool:
        """Lock the open file, if it is free and still at its path. The caller holds the guard."""
        other = _held.get(self._identity)
        if other is not None:
            raise StoreLockedError(
                f"{self.path}: this very process (pid {os.getpid()}) has it open, from "
                f"{other._opener}",
                "share it or close it first",
            )
        if not system.lock(self.fd):
            if monotonic() < deadline:
                return False
            raise StoreLockedError(
                f"{self.path}: {_holder(self.fd)} has it open; one process at a time may"
                f"{self._after_waiting()}",
                _WHAT_TO_DO,
            )
        # Whoever had it may have unlinked or replaced it between our open and our lock.
        if self._path_names_it():
            _held[self._identity] = self
            return True
        system.unlock(self.fd)
        return False

    def is_held_here(self) -> bool:
        """Return whether this very thread is at opening or closing some file."""
        return _guard._is_owned()

    def _after_waiting(self) -> str:
        return f" (waited for {self._timeout:g} seconds)" if self._timeout else ""

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
    def owned_by_parent(self) -> bool:
        """Whether this is a forked child, and its parent the one that has the lock."""
        return self._pid != os.getpid()

    def check_path(self) -> None:
        """Raise OSError where the path no longer names the open file.

        Not where that cannot be told: the folder may not be searched any more, or the root is
        another one, since this process has given up rights or changed its root.
        """
        if self._is_lost():
            raise OSError(
                ESTALE, "the file was removed or replaced while the store had it open", self.path
            )

    def _is_lost(self) -> bool:
        with suppress(OSError):  # it may not look there any more
            if self._path_names_it():
                return False
            if _root(self.path) == self._root:
                return True
        with suppress(OSError):  # closed meanwhile
            return os.fstat(self.fd).st_nlink == 0
        return False

    def _path_names_it(self) -> bool:
        if not system.renames_open_files:
            return True
        try:
            status = os.stat(self.path)
        except OSError as error:
            if error.errno in _ABSENT:
                return False
            raise
        return (status.st_dev, status.st_ino) == self._identity

    def remove_if_new(self) -> None:
        """Remove the file if this opening made it, and it is empty. The caller has it locked."""
        if self._is_new and os.fstat(self.fd).st_size == 0 and self._path_names_it():
            self.remove()

    def remove(self) -> None:
        """Remove the file: now, or as the lock is released where an open file cannot be removed.

        Raises:
            OSError: it cannot be removed now.
        """
        if system.renames_open_files or self.fd < 0:
            os.unlink(self.path)
        else:
            self._is_to_remove = True

    def release(self) -> None:
        """Release the lock. Idempotent; does nothing in a forked child."""
        try:
            with thread.inside, _guard:
                self._release_alone()
        finally:
            if waiting:
                leave()

    def _release_alone(self) -> None:
        if _held.get(self._identity) is self:
            try:
                if self.fd >= 0:
                    system.unlock(self.fd)
            finally:
                try:
                    self._close()
                finally:
                    del _held[self._identity]
                    if self._is_to_remove:
                        with suppress(OSError):  # somebody else may have it open by now
                            os.unlink(self.path)

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError(f"{self.path}: the lock of an open file cannot be copied")

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        # Forgotten first: the number may be another file's by the time of a second call.
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)


def _root(path: str) -> tuple[int, int] | None:
    """Return what tells the root folder that a path begins at; None where nothing does."""
    try:
        status = os.stat(os.path.splitdrive(path)[0] + os.sep)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _caller() -> str:
    """Return the file and line that the call into this package comes from."""
    frame = sys._getframe(levels_to_caller() - 1)
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def _holder(fd: int) -> str:
    """Return what can be said of the process that holds the lock on this open file."""
    try:
        head = system.read_at(fd, HOLDER_OFFSET + HOLDER.size, 0)
    except OSError:
        return "another process"
    if len(head) == HOLDER_OFFSET + HOLDER.size and head.startswith(FILE_MAGIC):
        (pid,) = HOLDER.unpack_from(head, HOLDER_OFFSET)
        if pid and system.is_holder(pid, fd):
            return f"process {pid}"
    return "another process"


def _hold_guard() -> None:
    """Before a fork: wait until no other thread is at opening or closing a locked descriptor."""
    if not _guard._is_owned():
        _forking.add(get_ident())
        _guard.acquire()
        _forking.add(get_ident())  # a signal handler may have forked meanwhile


def _release_guard() -> None:
    # It is held for another reason where the fork is amid an opening; and by another thread, or by
    # none, where what a signal handler raised has ended the wait: no fork heeds that.
    if get_ident() in _forking:
        _forking.discard(get_ident())
        if _guard._is_owned():
            _guard.release()


def _go_on_in_parent() -> None:
    _release_guard()
    if waiting:
        leave()


def _forget_in_child() -> None:
    """In a forked child: give up the parent's locks without releasing them, and tell the owners."""
    global _guard
    _release_guard()
    _forking.clear()
    _guard = Lock()
    forget_others()
    locks = list(_held.values())
    _held.clear()
    for lock in locks:
        lock._close()
        owner = lock._after_fork and lock._after_fork()
        if owner is not None:
            owner()


system.at_fork(
    before=_hold_guard, after_in_parent=_go_on_in_parent, after_in_child=_forget_in_child
)
