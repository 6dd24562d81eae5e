"""Room for a record that found none, whatever its size: each step costs more than the one before.

1. What has expired is purged.
2. Segments of the table merge. That needs no flush, and later they are not as empty.
3. What was retired is reclaimed.
4. Records of the sparsest extents move, so that these are free for any class.

Each is done in part only, so that nobody waits for long; then the record is tried again. Where
nothing more can be gained, the store is full, and says so at once until enough was freed, or
something has expired.

The same is done before the file grows, where less than half of it is in use, but for a few MiB: so
the file stays within twice what it ever had to hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Final

from . import clock
from .all_keys import AllKeys
from .errors import CorruptStoreError, StoreFullError
from .file.datafile import DataFile
from .format.layout import DIRECTORY_ENTRIES, EXTENT_SIZE, SEGMENT_SLOTS
from .index.extents import Extents
from .index.slab import Slab
from .index.sparse import count_usage
from .index.versions import Versions
from .locks import StoreLocks, operation
from .reclaiming import Reclaimer

# What is done at once.
_MOST_MERGED: Final = 4  # segments
_MOST_LOOKED_AT: Final = 256  # segments, for some to merge
_MOST_EMPTIED: Final = 64  # extents
# How often, for one record, what was retired: others may retire as fast as that, and take the room.
_MOST_RECLAIMED: Final = 4
_MOST_MOVED: Final = 512 * 1024  # bytes of records
# Live slots in a merged segment, at the most: so that many are to come before it is split again.
_MOST_IN_MERGED: Final = SEGMENT_SLOTS * 3 // 4
# What the file may have beyond twice what is in use, before room is made instead of growing.
_GROWS_FREELY: Final = 8 * 1024 * 1024


class Room:
    """Makes room in a store, and knows when there is none to be made."""

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        extents: Extents,
        slab: Slab,
        versions: Versions,
        reclaimer: Reclaimer,
        all_keys: AllKeys,
    ) -> None:
        self._locks = locks
        self._file = file
        self._extents = extents
        self._slab = slab
        self._versions = versions
        self._reclaimer = reclaimer
        self._all_keys = all_keys
        # Nothing can be gained before so many bytes were released in all since the store was
        # opened; and how much was retired then, and could not be reclaimed.
        self._full_until = self._unreclaimed = 0
        self._merged_until = 0  # likewise for merging segments
        self._growing: list[int] = []  # threads; each change of it is one step

    def is_full(self) -> bool:
        """Return whether `make` gained nothing, and too little has been freed since.

        The caller holds no lock.
        """
        return self._gains_nothing() and self._locks.while_open(self._is_full)

    def _is_full(self) -> bool:
        """As `is_full`; the caller holds a stripe."""
        return (
            self._gains_nothing()
            and self._versions.retired_size <= self._unreclaimed
            and self._all_keys.is_purged()
        )

    def _gains_nothing(self) -> bool:
        return self._versions.released < self._full_until

    @operation(flushes=True)
    def make(self, step: int) -> bool:
        """Take back what can be, or some of it, for a record that found no room.

        Returns:
            Whether it may find some now; else there is none to be had.
        """
        if self._purge() or step == 0:
            return True
        if (self._waits_for_flush() or self._lacks_extent()) and self._merge(_MOST_LOOKED_AT):
            return True
        if self._reclaim() and step < _MOST_RECLAIMED:
            return True
        # Where an extent is free, it is something else that there is no room for.
        return self._lacks_extent() and self._gain_extent()

    def _gain_extent(self) -> bool:
        if self._gains_nothing():
            return False
        released = self._versions.released
        missing: int | None = EXTENT_SIZE
        try:
            if self._file.pristine:
                self._locks.mark_dirty()
            missing = self._reclaimer.evacuate_inside(_MOST_EMPTIED, _MOST_MOVED)
        except CorruptStoreError:
            pass
        except StoreFullError:  # the disk refused a write, and may take the next
            missing = None
        if missing == 0 or self._merge(DIRECTORY_ENTRIES) or self._flush_freed():
            return True
        if missing is not None:
            self._full_until = released + missing
            self._unreclaimed = self._versions.retired_size
        return False

    def _lacks_extent(self) -> bool:
        return not self._locks.while_open(self._slab.has_free_extent)

    def _waits_for_flush(self) -> bool:
        """Return whether there are free extents that are of no use to the table before a flush."""
        return self._locks.while_open(lambda: self._extents.waits_for_flush)

    def _purge(self) -> int:
        """Take back some of what has expired, and what can be without a flush; return how many."""
        purged = 0
        with suppress(StoreFullError, CorruptStoreError):
            purged = self._all_keys.purge_some()
            self._locks.while_open(self._slab.free_pending)
            self._locks.while_open(self._slab.free_spare)
        return purged

    def _reclaim(self) -> bool:
        """Take back what is retired; return whether there is more room, for whatever size."""
        before = self._versions.retired_size
        if before:
            with suppress(StoreFullError, CorruptStoreError):
                self._reclaimer.reclaim_inside()
                self._locks.while_open(self._slab.free_spare)
        return self._flush_freed() or self._versions.retired_size < before

    def _flush_freed(self) -> bool:
        waits = self._waits_for_flush()
        if waits:
            self._file.flush()
        return waits

    def _merge(self, most_looked_at: int) -> int:
        """Merge some segments, unless none of all could be before, and little was freed since."""
        released = self._versions.released
        if released < self._merged_until:
            return 0
        merged = 0
        try:
            merged = self._all_keys.merge_some(_MOST_MERGED, _MOST_IN_MERGED, most_looked_at)
        except CorruptStoreError:
            pass
        except StoreFullError:  # as above
            return 0
        if not merged and most_looked_at >= DIRECTORY_ENTRIES:
            self._merged_until = released + EXTENT_SIZE
        return merged

    # --- before the file grows -----------------------------------------------------------------

    def should_be_made(self) -> bool:
        """Return whether room is to be made before the file grows.

        The caller holds a stripe and the space lock.
        """
        file = self._file
        if file.size <= _GROWS_FREELY or get_ident() in self._growing or self._is_full():
            return False
        usage = count_usage(file)
        if usage.earliest <= clock.now_ms() and not self._all_keys.is_purged():
            return True
        if self._gains_nothing():
            return False
        if file.size > 2 * usage.used + _GROWS_FREELY:
            return True
        if file.size > 2 * usage.taken:  # more is free in blocks than in use
            self._slab.wants_reclaiming = True
        return False

    @contextmanager
    def growing(self) -> Iterator[None]:
        """Have the file grow for what this thread stores: `make` has gained all that it can.

        Something may have expired since, and what is damaged is never taken back.
        """
        self._growing.append(get_ident())
        try:
            yield
        finally:
            self._growing.remove(get_ident())

    @operation(flushes=True)
    def make_ahead(self) -> None:
        """Make room for about as much as the file would grow by; for a thread of its own."""
        self._purge()
        self._reclaim()
        for _ in range(1 + (self._file.extent_count >> 3) // _MOST_EMPTIED):
            if not self._locks.while_open(self._is_loose):
                break
            if not (self._merge(_MOST_LOOKED_AT) or self._gain_extent()):
                break

    def _is_loose(self) -> bool:
        return self._file.size > 2 * count_usage(self._file).taken
