"""A data file that this process holds: locked, and open once more for what is done with it."""

import os
from contextlib import suppress

from .lock import FileLock
from .platform import system


class HeldFile:
    """The lock on a data file, and a descriptor of it whose copies do not hold the lock.

    Args:
        path: absolute path.
        timeout: seconds to wait for another process.
        create: create the file where it is missing.

    Attributes:
        fd: the descriptor; -1 before `open` and after `close`.
        in_place: the file system overwrites in place what is reserved: a store is never refused.
        may_be_private: a private mapping shows what is written to the file afterwards.
        is_new: the store in it was made in this opening.
        has_failed: the opening has; what it made is not kept.
        keeps_lock: `close` leaves the lock, which somebody else releases.

    Raises:
        StoreLockedError: as `FileLock`.
        OSError: what the operating system said.
    """

    def __init__(self, path: str, timeout: float, *, create: bool = True) -> None:
        self.path = path
        self.lock = FileLock(path, timeout, create=create)
        self.fd = -1
        self.in_place = self.may_be_private = False
        self.is_new = False
        self.has_failed = self.keeps_lock = False

    def open(self) -> None:
        """Open the file that is locked, and find out what kind of file system it is on."""
        self.fd = self.lock.open_again()
        self.in_place = system.overwrites_in_place(self.fd)
        self.may_be_private = not self.in_place and system.may_be_mapped_privately(self.fd)

    def close(self) -> None:
        """Close the file, and unless it is kept release its lock, whatever fails. Idempotent."""
        try:
            if self.has_failed:
                self._take_back_new_file()
            self.close_descriptor()
        finally:
            if not self.keeps_lock:
                self.lock.release()

    def _take_back_new_file(self) -> None:
        """After a first opening that failed: leave what was there before it, nobody else saw it.

        Whoever waits for the lock finds the file gone when he has it, and makes another.
        """
        with suppress(OSError):
            if self.is_new:
                os.ftruncate(self.fd, 0)
            self.lock.remove_if_new()

    def close_descriptor(self) -> None:
        """Close the file, and leave the lock as it is."""
        # Forgotten first: after a fork amid this, the number may be that of another file.
        descriptor, self.fd = self.fd, -1
        if descriptor >= 0:
            os.close(descriptor)
