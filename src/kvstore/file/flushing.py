"""What of an open file is owed to stable storage, and how it gets there."""

import mmap
from contextlib import suppress
from threading import get_ident

from kvstore.errors import StoreFullError

from .group_commit import GroupCommit
from .held import HeldFile
from .platform import system
from .reentry import leave, thread, waiting
from .state import DiskState


class Flushing:
    """The flushes of an open file, shared by the threads that wait for one.

    Args:
        held: the file.
        mapped: its mapping.
        state: told how many extents have become durable.
        by_pages: a single record's pages may be flushed alone, where the system knows how.
    """

    def __init__(
        self, held: HeldFile, mapped: mmap.mmap, state: DiskState, *, by_pages: bool
    ) -> None:
        self._held = held
        self._mapped = mapped
        self._state = state
        self._underway: set[int] = set()  # threads that are amid a flush
        self._group_commit = GroupCommit(
            self._flush_file,
            self._flush_pages if by_pages and system.can_flush_pages() else None,
        )

    def _flush_file(self) -> None:
        system.flush_file(self._held.fd, self._mapped)

    def _flush_pages(self, start: int, end: int) -> None:
        system.flush_pages(self._mapped, start, end)

    def flush(self) -> None:
        """Return when everything written before the call is on stable storage.

        Threads that wait at the same time share a flush. The caller holds no lock.

        Raises:
            OSError: the disk did not take it, now or ever since the file was opened.
        """
        self._flush_inside(None)

    def flush_record(self, offset: int, size: int) -> None:
        """Return when the `size` bytes at `offset` are on stable storage, and all that is owed.

        For an operation that is durable: everything but its record, or the link that ends it, is
        index, which is rebuilt after power loss. Where the file is not overwritten in place, or
        something is owed, or others wait too, it is one flush of everything. The caller holds no
        lock.

        Raises:
            OSError: as `flush`.
        """
        self._flush_inside((offset, offset + size))

    def _flush_inside(self, byte_range: tuple[int, int] | None) -> None:
        ident = get_ident()
        is_outermost = ident not in self._underway
        try:
            with thread.inside:
                self._underway.add(ident)
                cuts, count = self._state.cuts, self._state.now.extent_count
                if self._group_commit(byte_range) and count > self._state.now.durable_count:
                    self._count_as_durable(count, cuts)
        finally:
            if is_outermost:
                self._underway.discard(ident)
            if waiting:
                leave()

    def _count_as_durable(self, count: int, cuts: int) -> None:
        """Note that so many extents are durable, unless the file was cut since."""
        state = self._state
        with state.lock, suppress(StoreFullError):  # an old number is true as well
            if not state.closed and count > state.now.durable_count and cuts == state.cuts:
                state.set_durable_count(count)

    def is_underway_here(self) -> bool:
        """Return whether this very thread leads or follows a flush."""
        return get_ident() in self._underway

    def threads(self) -> set[int]:
        """Return the threads that lead or follow a flush."""
        return self._underway.copy()

    def require_full_flush(self) -> None:
        """Have no durable operation return from now on before a flush of everything.

        Needed wherever something else than the operation's own bytes could cost it its record:
        - The file grew: its length and state, without which the new extents are cut off.
        - An extent became free. Records that were cleared in it, by whatever operation, could come
          back beside those of another size class, and only one class survives in an extent.
        - A record was cleared by anything else than a durable `delete`: it had expired, or its
          creation was undone. It could come back beside a later record of the same key, and be
          taken for the newer one, for clocks tie and are set back.
        - A change was cut short.

        The caller has made that change, and still holds the lock that others need to build on it:
        the space lock for extents, the stripe for keys.
        """
        self._group_commit.require_full()

    def note_freed(self) -> None:
        """As `require_full_flush`, for an extent that became free, under the space lock."""
        self._group_commit.require_full_flush_for_reuse()

    @property
    def freed_may_come_back(self) -> bool:
        """Whether power loss could bring back records of extents that became free."""
        return self._group_commit.reuse_waits

    def record_cleared(self, offset: int) -> None:
        """As `require_full_flush`, for the record at `offset` that a durable `delete` has cleared.

        The operation itself goes on to `flush_record`, which then is enough. Until it returns,
        those of other threads flush everything. The caller holds the key's stripe.
        """
        self._group_commit.record_cleared(offset)

    def flush_contents(self) -> None:
        """As `flush`, by whoever opens or closes the file: nothing is noted as durable."""
        self._group_commit()

    def flush_last(self) -> None:
        """Flush once more, alone, after `end`."""
        self._flush_file()

    def end(self) -> None:
        """Wait for the running flush, if any; from now on calls return at once."""
        self._group_commit.end()
