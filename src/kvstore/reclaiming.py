"""Reclaiming: the blocks of records that were superseded, or marked as deleted, become free again.

What was retired may be what the disk has of its key, so it is cleared only once all that came later
has been flushed; a mark, only once all that it outranks has been cleared and flushed. So, one
generation after the other:

1. With all stripes held, begin a new generation.
2. Flush. Free what was retired, but not marked, in other generations.
3. Flush. Free what was marked in other generations.
4. Note that records of before have no older ones on the disk any more; where nothing was marked,
   so that there was no second flush, with the first one of the next time.

That is done as the store is closed; by a thread of its own, which ends then, where the file would
have to grow although much of it is retired; and by an operation that finds no room. `versions` has
what the answers to "may this be cleared at once?" rest on.
"""

from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING

from .compiled import Lock
from .errors import KVStoreError, StoreBusyError
from .file.datafile import DataFile
from .format.layout import EXTENT_SIZE, MARKED_MAGIC, MAX_EXTENTS, RECORD_MAGIC, STRIPE_COUNT
from .index.slab import Slab
from .index.versions import Versions
from .locks import StoreLocks, Turns, operation

if TYPE_CHECKING:
    from .moving import Mover


class Reclaimer:
    """Reclaims the retired blocks of a store; one thread at a time."""

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        slab: Slab,
        versions: Versions,
        make_mover: Callable[[], "Mover"],
    ) -> None:
        self._locks = locks
        self._file = file
        self._slab = slab
        self._versions = versions
        self._make_mover = make_mover
        self._made_mover: Mover | None = None
        self._running = Lock()  # taken before any other
        self._has_thread = False
        self._turns = Turns()
        # What `settle` takes once all that was cleared so far has been flushed.
        self._swept: array[int] | None = None
        # What a thread of its own does after that.
        self.make_ahead: Callable[[], None] = _do_nothing

    @property
    def _mover(self) -> "Mover":
        """What moves records, for who is alone in reclaiming."""
        if self._made_mover is None:
            self._made_mover = self._make_mover()
        return self._made_mover

    def keep_up(self) -> None:
        """Reclaim in a thread of its own, where one would be of use. The caller holds no lock.

        Where that one does not keep up, wait for it. Where no thread can be had, as while the
        interpreter ends, it is done another time.
        """
        self._slab.wants_reclaiming = False
        if self._has_thread:
            if self._slab.retires_too_much():
                with suppress(KVStoreError, OSError):
                    self.reclaim()
        else:
            self._has_thread = True
            try:
                Thread(target=self._run_thread, name="kvstore-reclaim").start()
            except BaseException as error:
                self._has_thread = False
                if not isinstance(error, RuntimeError):
                    raise

    def _run_thread(self) -> None:
        try:
            # Whoever flushes next is told of a failed flush.
            with suppress(KVStoreError, OSError):
                self.reclaim()
                self.make_ahead()
        finally:
            self._has_thread = False

    @operation(flushes=True)
    def reclaim(self) -> None:
        """As `reclaim_inside`, as an operation of its own."""
        self.reclaim_inside()

    def reclaim_inside(self) -> None:
        """Reclaim all that was retired by now. The caller holds no lock.

        Raises:
            StoreBusyError: this thread is doing so already, and was interrupted.
            StoreClosedError: the store is closed.
            StoreFullError, OSError: the disk refused a write or a flush.
        """
        with self._alone():
            if self._slab.count_retired():
                self._reclaim()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have no other thread reclaim, or close the file, meanwhile."""
        if self._running._is_owned():
            raise StoreBusyError(f"{self._file.path}: this thread is reclaiming space already")
        with self._running:
            # Asked here: whoever closes the store waits for this lock before the file is unmapped.
            if self._locks.closed:
                self._locks.raise_closed()
            yield

    def evacuate_inside(self, most: int, most_moved: int) -> int:
        """Empty the sparsest extents of the slab, so that they are free for any size.

        At the most so many extents, and `most_moved` bytes of records. The caller holds no lock.

        Returns:
            0 where some were emptied, or another thread was faster; else how many bytes have to be
            freed before any can be.

        Raises: as `reclaim_inside`.
        """
        released = self._versions.released
        with self._alone():
            if self._versions.released != released and self._slab.has_free_extent():
                return 0
            # What was found earlier may have been too much, what is found now cannot.
            last = self._mover.searches + 1
            while self._mover.searches <= last:
                extents, missing = self._mover.choose(most, most_moved)
                if not extents:
                    return missing
                self._empty(extents)
                if self._slab.has_free_extent():
                    return 0
            return EXTENT_SIZE

    def empty_inside(self, extents: list[int], limit: int) -> None:
        """Move the records of these extents to such before `limit`, and reclaim.

        As far as there is room, opened for it where need be. The caller holds no lock.

        Raises: as `reclaim_inside`.
        """
        with self._alone():
            self._empty(extents, limit)

    def _empty(self, extents: list[int], limit: int = MAX_EXTENTS) -> None:
        self._swept = None  # what moves has a copy, be it settled or not
        self._mover.evacuate(extents, limit)
        if self._versions.retired_size:
            self._reclaim()
        self._locks.while_open(self._slab.free_spare)

    def _reclaim(self) -> None:
        versions = self._versions
        stamps = self._locks.with_all_stripes(versions.begin_generation)
        generation = versions.generation
        swept, self._swept = self._swept, None
        self._file.flush()
        if swept is not None:
            versions.settle(swept)
        self._sweep(RECORD_MAGIC, generation)
        if versions.leaks:
            return
        if versions.marks:
            self._file.flush()
            self._sweep(MARKED_MAGIC, generation)
            versions.settle(stamps)
        else:
            self._swept = stamps

    def _sweep(self, magic: int, generation: int) -> None:
        for number, extent in enumerate(self._slab.count_retired(), 1):
            # A stripe, of which any will do, keeps the store open meanwhile.
            with self._locks.stripes[number % STRIPE_COUNT]:
                if self._locks.closed:
                    self._locks.raise_closed()
                self._slab.sweep(extent, magic, generation)
            self._turns.give()

    def finish(self) -> None:
        """Reclaim what is left once the store is closed: nothing else is done in it any more.

        Where that fails, the next opening does it.
        """
        with self._running:  # another thread has come to its end
            try:
                for magic in (RECORD_MAGIC, MARKED_MAGIC):
                    if (extents := self._slab.count_retired()) and not (
                        magic == MARKED_MAGIC and self._versions.leaks
                    ):
                        self._file.flush()
                        for extent in extents:
                            self._slab.sweep(extent, magic, 0)
                if self._slab.count_retired():
                    self._file.require_rebuild()
                self._slab.free_spare()
            except BaseException as error:
                self._file.require_rebuild()
                if not isinstance(error, KVStoreError | OSError):
                    raise


def _do_nothing() -> None:
    """Nothing is to be done."""
