"""A store's file, opened for looking at: its bytes, and what its superblock says.

Nothing here changes the file. It is read and not mapped: a file that another program cuts off, or a
disk that fails, is then an OSError and not the end of the process.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Final

from kvstore import CorruptStoreError, StoreLockedError, UnsupportedFormatError
from kvstore.file.lock import FileLock
from kvstore.file.platform import system
from kvstore.format.layout import (
    EXTENT_SHIFT,
    EXTENT_SIZE,
    FILE_MAGIC,
    FIXED_EXTENTS,
    HOLDER,
    HOLDER_OFFSET,
    IDENTITY,
    IDENTITY_OFFSETS,
    MAX_EXTENTS,
    RECORD_MAGIC_BYTES,
    SLAB_ENTRY,
    STATE,
    STATE_OFFSET,
    map_entry_offset,
)
from kvstore.format.superblock import (
    Identity,
    State,
    index_checksum,
    unknown_format,
    unpack_holder,
    unpack_identity,
    unpack_state,
)

from .opening import Opening, next_opening

# At what does not fit in a file in use: it may be a change half made.
_LOOKS: Final = 6
_PAUSE_SECONDS: Final = 0.001
_PATIENCE: Final = 1_000  # pauses, without one that helped


class FileView:
    """The bytes of a file, and what its superblock says.

    Args:
        path: for messages.
        fd: an open descriptor, which stays the caller's.
        in_use: another process may be changing the file meanwhile.

    Attributes:
        identity, state: of the superblock.
        extent_count: how many extents of the file there are to look at.
        trusted: it was closed in order, and the index has the checksum that it had then.
        problems: what is wrong with superblock or length, in sentences.

    Raises:
        UnsupportedFormatError: the file is no store, or of a newer format.
        CorruptStoreError: both copies of its identity are damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, fd: int, *, in_use: bool) -> None:
        self.path = path
        self.in_use = in_use
        self._fd = fd
        self._patience = _PATIENCE
        self._next_opening: Opening | None = None
        self.look_again()
        for _ in self.looks():
            if not self.problems:
                break
        self.trusted = (
            self.state.clean
            and self.extent_count == self.state.extent_count
            and self.state.index_checksum == self.index_checksum()
        )
        if self.state.clean and not self.problems and not self.trusted and not in_use:
            self.problems.append("the index is not as it was when the file was closed")

    def looks(self, pause: float = _PAUSE_SECONDS) -> Iterator[int]:
        """Yield numbers from 0 on, for one look at a file at rest, and several at one in use.

        Stop when what is looked at fits. Before each but the first is a pause, in which a change
        can be completed; but not for long where it is damage that there is a lot of.
        """
        yield 0
        for number in range(1, _LOOKS if self.in_use else 1):
            if self._patience:
                self._patience -= 1
                sleep(pause)
                self.look_again()
            yield number

    def hope_again(self) -> None:
        """Take note that a pause has helped."""
        self._patience = _PATIENCE

    def look_again(self) -> None:
        """Learn length and superblock anew, of a file that may have grown since."""
        self.problems: list[str] = []
        self._size = os.fstat(self._fd).st_size
        self.identity = self._load_identity()
        self.seed = self.identity.hash_seed
        self.state = self._load_state()
        # One that was cut off within is looked at too.
        extents = self._size + EXTENT_SIZE - 1 >> EXTENT_SHIFT
        self.extent_count = min(extents, max(self._known_extents(), self._used_beyond()))
        self._compare_lengths()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, where: slice) -> bytes:
        """Return bytes of the file; fewer where it ends."""
        start, stop, _ = where.indices(self._size)
        return self.read(start, stop - start)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; fewer where the file ends."""
        return system.read_at(self._fd, max(0, min(size, self._size - offset)), offset)

    def extent(self, number: int) -> bytes:
        """Return all bytes of an extent; fewer where the file ends within it."""
        return self[number << EXTENT_SHIFT : (number + 1) << EXTENT_SHIFT]

    def padded_extent(self, number: int) -> bytes:
        """Return all bytes of an extent; zeros past the file's end."""
        return self.exactly(number << EXTENT_SHIFT, EXTENT_SIZE)

    def map_entry(self, extent: int) -> bytes:
        """Return the sixteen bytes of the extent map on that extent; zeros past the file's end."""
        return self.exactly(map_entry_offset(extent), SLAB_ENTRY.size)

    def status(self) -> os.stat_result:
        """Return what the operating system says of the file."""
        return os.fstat(self._fd)

    def allocated_size(self) -> int | None:
        """Return how many bytes of the disk the file takes; None where nobody tells."""
        blocks: int | None = getattr(self.status(), "st_blocks", None)
        return None if blocks is None else 512 * blocks

    def holder(self) -> int:
        """Return the process id that is written in the file; 0 where it was closed."""
        return unpack_holder(self.read(HOLDER_OFFSET, HOLDER.size))

    def holder_lives(self) -> bool:
        """Return whether the process that the file names as having it open is there."""
        pid = self.holder()
        return pid > 0 and system.is_alive(pid)

    def next_opening(self) -> Opening:
        """Return what the next opening does; of a file that is open, what that did.

        Found out once: it may take reading all of the file.
        """
        if self.in_use and self.holder_lives():
            return Opening.USES
        if self._next_opening is None:
            self._next_opening = next_opening(self.path, self._fd)
        return self._next_opening

    def index_checksum(self) -> int:
        """Return the checksum of directory, extent map and allocator as they are now.

        Where the file was cut off, the map is that of all extents that it had.
        """
        extent_count = self.state.extent_count if self.counts_extents else self.extent_count
        return index_checksum(self, extent_count, self.seed)

    def exactly(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; zeros past the file's end."""
        return self[offset : offset + size].ljust(size, b"\0")

    def _load_identity(self) -> Identity:
        found: Identity | None = None
        magics = 0
        for offset in IDENTITY_OFFSETS:
            copy = self.exactly(offset, IDENTITY.size)
            identity = unpack_identity(copy)
            magics += copy.startswith(FILE_MAGIC)
            if identity is None:
                self.problems.append(f"the copy of the identity at byte {offset:,} is damaged")
            found = found or identity
        if found is None:
            if magics:
                raise CorruptStoreError(
                    f"{self.path}: both copies of the identity are damaged; without the hash seed "
                    f"in them no record can be told from garbage"
                )
            raise UnsupportedFormatError(
                f"{self.path}: not a kvstore file" + ("" if self._size else ": it is empty")
            )
        if not found.is_known_format:
            raise UnsupportedFormatError(f"{self.path}: {unknown_format(found)}")
        return found

    def _load_state(self) -> State:
        state = unpack_state(self.exactly(STATE_OFFSET, STATE.size), self.seed)
        if not state.intact:
            self.problems.append(f"the state at byte {STATE_OFFSET:,} is damaged")
        return state._replace(clean=state.clean and state.intact)

    @property
    def counts_extents(self) -> bool:
        """Whether the state tells how many extents there are."""
        return self.state.intact and FIXED_EXTENTS < self.state.extent_count <= MAX_EXTENTS

    def _known_extents(self) -> int:
        return self.state.extent_count if self.counts_extents else MAX_EXTENTS

    def _used_beyond(self) -> int:
        """Return how many extents the records of a file that was not closed need.

        Power loss may take back the new length in its state, and not what is in the new extents.
        """
        if self.state.clean or self.in_use or not self.counts_extents:
            return 0
        end = self.state.extent_count * EXTENT_SIZE
        last = system.find_last(self._fd, RECORD_MAGIC_BYTES, end, self._size)
        return 0 if last < 0 else min(last + EXTENT_SIZE >> EXTENT_SHIFT, MAX_EXTENTS)

    def _compare_lengths(self) -> None:
        needed = FIXED_EXTENTS
        if self.state.intact:
            count, durable = self.state.extent_count, self.state.durable_count
            needed = max(needed, count if self.state.clean else durable)
        if self._size < needed * EXTENT_SIZE:
            self.problems.append(
                f"the file is {self._size:,} bytes, shorter than its contents of "
                f"{needed * EXTENT_SIZE:,}: it was cut off"
            )


@contextmanager
def locked(path: Path, wait: float) -> Iterator[FileLock]:
    """Hold the lock of an existing file.

    Raises:
        StoreLockedError: another process has it after `wait` seconds.
        OSError: it cannot be opened.
    """
    lock = FileLock(os.path.abspath(path), wait, read_only=True)
    try:
        yield lock
    finally:
        lock.release()


@contextmanager
def open_view(path: Path, *, wait: float = 0.0, unlocked: bool = False) -> Iterator[FileView]:
    """Open the file at `path` and hold its lock, unless it is to be looked at without.

    Args:
        path: the file.
        wait: seconds to wait for another process to let go of it.
        unlocked: do not lock; another process may be changing the file meanwhile.

    Raises:
        StoreLockedError: another process has it after `wait`; or, also unlocked, a lease on it.
        OSError: it cannot be opened for reading, or is no regular file.
        UnsupportedFormatError, CorruptStoreError: as `FileView`.
    """
    if not unlocked:
        with locked(path, wait) as lock:
            yield FileView(path, lock.fd, in_use=False)
        return
    try:
        fd = os.open(os.path.abspath(path), os.O_RDONLY | system.flags)
    except BlockingIOError:
        raise StoreLockedError(f"{path}: somebody has a lease on it (F_SETLEASE)") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(22, "not a regular file", str(path))
        yield FileView(path, fd, in_use=True)
    finally:
        os.close(fd)
