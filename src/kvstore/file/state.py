"""The state that the superblock keeps of an open file."""

from collections.abc import Callable

from kvstore.compiled import Lock
from kvstore.format.layout import IDENTITY_OFFSETS, STATE_OFFSET
from kvstore.format.superblock import State

from .opening import FoundFile


class DiskState:
    """The state on disk, written whole whenever one of its fields changes.

    The caller of what changes it holds `lock`.

    Args:
        found: the file as it was found.
        extent_count: how many of its extents are in use.
        write: the write path of the file.

    Attributes:
        lock: covers all of this; no other lock is taken under it, but for that of a flush.
        now: the fields; those that a clean state has alone are zero meanwhile.
        closed: nothing more is written, but by whoever closes the file.
        cuts: how often the file was made shorter.
    """

    def __init__(
        self, found: FoundFile, extent_count: int, write: Callable[[int, bytes], None]
    ) -> None:
        self.lock = Lock()
        self.closed = False
        self.cuts = 0
        was = found.state
        void_stamp = 0 if was.clean else was.stamp
        self.now = State(was.clean, extent_count, was.durable_count, 0, 0, void_stamp)
        self._hash_seed = found.hash_seed
        self._is_intact = found.state.intact
        self._identity_to_restore = found.identity if found.identity_damaged else None
        self._write = write

    def write(self, state: State) -> None:
        """Write this state; where that fails, the one before still holds."""
        self._write(STATE_OFFSET, state.pack(self._hash_seed))
        self.now = state

    def mark_dirty(self) -> None:
        """Say that the index is not to be trusted, and heal what of the superblock is damaged."""
        if self._identity_to_restore is not None:
            for offset in IDENTITY_OFFSETS:
                self._write(offset, self._identity_to_restore)
            self._identity_to_restore = None
        if self.now.clean or not self._is_intact:
            self.write(self.now._replace(clean=False))
            self._is_intact = True

    def set_void_stamp(self, stamp: int) -> None:
        """Say that records with this stamp or an earlier one are void; 0: none are."""
        if stamp != self.now.stamp:
            self.write(self.now._replace(stamp=stamp))

    def set_extent_count(self, count: int) -> None:
        """Say how long the file is by now."""
        self.write(self.now._replace(extent_count=count))

    def set_shorter(self, count: int, void_stamp: int) -> None:
        """Say that the file is this long, and no longer for sure, and which records are void."""
        self.cuts += 1
        self.write(self.now._replace(extent_count=count, durable_count=count, stamp=void_stamp))

    def set_durable_count(self, count: int) -> None:
        """Say how long it is at least on stable storage. Where that fails, it is said later."""
        self.now = self.now._replace(durable_count=count)
        self.write(self.now)
