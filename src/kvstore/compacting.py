"""Compacting: everything moves together at the start of the file, and the rest is cut off.

1. What has expired is purged, what was retired is reclaimed, segments of the table merge.
2. Records of the sparsest extents move to others of their class, until no extent can be had so.
3. What is in the last extents moves to free ones before them: records to extents of their class,
   segments whole.
4. With all stripes held, the list of free extents forgets those at the end, the disk hears that the
   file is shorter, and it is cut.

Each is done in small steps, and other threads go on in between. What they create may land anywhere:
then the file becomes less short. A step that finds nothing to move, for what is in the way is
damaged, is the last of its kind.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Final

from . import clock
from .all_keys import AllKeys
from .errors import CorruptStoreError, KVStoreError
from .file.datafile import DataFile
from .file.rollback import Rollback
from .format.layout import (
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    FIRST_FILE_SIZE,
    FIXED_EXTENTS,
    KIND_FREE,
    KIND_SEGMENT,
    SHAPE_OFFSET,
    SHAPE_PREFIX_SHIFT,
    STRIPE_COUNT,
)
from .index.extents import Extents
from .index.segments import Segments
from .index.slab import Slab
from .locks import StoreLocks, operation
from .reclaiming import Reclaimer

logger = logging.getLogger("kvstore")

Progress = Callable[[int, int], object]
"""Told how many extents of how many are as they are to be."""

_PROGRESS_SECONDS: Final = 1.0
_FEWEST: Final = FIRST_FILE_SIZE >> EXTENT_SHIFT
# What moves for one flush.
_MOST_EMPTIED: Final = 512  # extents
_MOST_MOVED: Final = 8 * 1024 * 1024  # bytes of records


class Compactor:
    """Compacts a store."""

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        extents: Extents,
        slab: Slab,
        segments: Segments,
        reclaimer: Reclaimer,
        all_keys: AllKeys,
    ) -> None:
        self._locks = locks
        self._file = file
        self._extents = extents
        self._slab = slab
        self._segments = segments
        self._reclaimer = reclaimer
        self._all_keys = all_keys

    @operation(flushes=True)
    def compact(self, show: Progress | None = None) -> int:
        """Compact the file, and return by how many bytes it became shorter."""
        file = self._file
        before = file.size
        progress = _Progress(file, show)
        if file.pristine:
            self._locks.mark_dirty()
        self._all_keys.purge_all()
        self._reclaimer.reclaim_inside()
        self._all_keys.merge_some(DIRECTORY_ENTRIES)
        self._gather(progress)
        self._move_down(progress)
        self.cut()
        return max(before - file.size, 0)

    def cut(self) -> None:
        """Cut the file after the last extent that is in use."""
        self._file.flush()  # so that the next one is short, which all others wait for
        self._locks.flush_alone(self._cut)

    def _gather(self, progress: "_Progress") -> None:
        """Empty extents as long as that leaves fewer in use."""
        fewest = self._count_used() + 1
        while (used := self._count_used()) < fewest:
            fewest = used
            progress.show(used, used)
            if self._reclaimer.evacuate_inside(_MOST_EMPTIED, _MOST_MOVED):
                break

    def _move_down(self, progress: "_Progress") -> None:
        """Move what is in the last extents to free ones before."""
        fewest = self._file.extent_count
        while True:
            count = max(FIXED_EXTENTS + self._count_used(), _FEWEST)
            astray = [extent for extent, _ in self._used_extents() if extent >= count]
            progress.show(count - len(astray), count)
            if not astray or len(astray) >= fewest:
                return
            fewest = len(astray)
            self._file.flush()  # so that the table may have what is free
            self._locks.while_open(self._sort_free)
            self._move_before(count, astray[-_MOST_EMPTIED:])

    def _sort_free(self) -> None:
        with self._extents.lock, Rollback(self._file) as rollback:
            self._extents.relink_free(self._file.extent_count, rollback)

    def _move_before(self, count: int, astray: list[int]) -> None:
        kinds = dict(self._used_extents())
        slabs = [extent for extent in astray if kinds.get(extent) not in (None, KIND_SEGMENT)]
        for extent in astray:
            if kinds.get(extent) == KIND_SEGMENT:
                with suppress(CorruptStoreError):
                    self._relocate(extent, count)
        self._reclaimer.empty_inside(slabs, count)

    def _relocate(self, extent: int, count: int) -> None:
        """Move a segment to a free extent before `count`, unless it is none by now."""
        words, place = self._file.words, (extent << EXTENT_SHIFT) + SHAPE_OFFSET >> 3
        shape = self._locks.while_open(lambda: words[place])
        position = shape >> SHAPE_PREFIX_SHIFT & DIRECTORY_ENTRIES - 1
        with self._locks.stripes[position * STRIPE_COUNT // DIRECTORY_ENTRIES]:
            if self._locks.closed:
                self._locks.raise_closed()
            if self._file.directory[position] == extent:
                try:
                    self._segments.relocate(position, count, clock.now_ms())
                except Exception:
                    raise
                except BaseException:
                    self._file.require_rebuild()
                    raise

    def _used_extents(self) -> list[tuple[int, int]]:
        """Return the extents that are in use but for the fixed ones, each with its kind."""
        return self._locks.while_open(self._find_used)

    def _find_used(self) -> list[tuple[int, int]]:
        return [
            (extent, kind)
            for extent, kind in enumerate(self._extents.kinds(self._file.extent_count))
            if extent >= FIXED_EXTENTS and kind != KIND_FREE
        ]

    def _count_used(self) -> int:
        return len(self._used_extents())

    def _cut(self) -> None:
        """Cut the file after the last extent that is in use. The caller holds all stripes."""
        if self._locks.closed:
            self._locks.raise_closed()
        self._slab.free_spare()
        with self._extents.lock:
            last = max((extent for extent, _ in self._find_used()), default=0)
            count = max(last + 1, _FEWEST)
            if count >= self._file.extent_count:
                return
            try:
                self._cut_after(count)
            except BaseException as error:
                is_refused = isinstance(error, KVStoreError | OSError)
                if not is_refused or self._file.extent_count == count:
                    self._cut_after(count)  # what was begun is ended
                raise

    def _cut_after(self, count: int) -> None:
        with Rollback(self._file) as rollback:
            self._extents.relink_free(count, rollback)
            self._file.cut(count, self._file.void_stamp)


class _Progress:
    """Says how far it is: to whoever asked, and now and then to the log."""

    def __init__(self, file: DataFile, show: Progress | None) -> None:
        self._file = file
        self._show = show
        self._due = monotonic() + _PROGRESS_SECONDS

    def show(self, done: int, count: int) -> None:
        """Say that so many extents of so many are where they are to be."""
        if self._show is not None:
            self._show(done, count)
        if monotonic() >= self._due:
            self._due = monotonic() + _PROGRESS_SECONDS
            logger.info(
                "%s: compacting; %d of %d extents are in place, the file has %d",
                self._file.path,
                done,
                count,
                self._file.extent_count,
            )
