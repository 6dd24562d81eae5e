"""The pool of extents: taken for segments and slabs, given back for either.

Invariants, under `lock`, the space lock:
1. Every extent is fixed, a segment, a slab extent, on the list of free ones, or at or after the
   fresh extent, and only one of these.
2. The extents of a class with a free block are on that class's list; see `slab`.
3. No record comes back after power loss in an extent that has become a segment: a slab's that
   became free is for slabs alone until everything has been flushed. Else the table could lose its
   own extents to records that were deleted, where there are no others. A segment's that became
   free is anybody's at once: while it was one, no record was there.
4. What the file has grown by in this opening held nothing but zeros: nobody has to look there for
   records of before it.

The space lock covers the extent map but for the counts in segments' entries, the allocator, and
growth. It is taken after a stripe and never before one.
"""

from collections.abc import Callable
from typing import Final

from kvstore.compiled import Lock
from kvstore.errors import CorruptStoreError, StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    EXTENT_MAP_ENTRIES,
    EXTENT_MAP_OFFSET,
    FIXED_EXTENTS,
    FREE_EXTENTS_OFFSET,
    FRESH_EXTENT_OFFSET,
    KIND_FREE,
    MAP_ENTRY_SHIFT,
    NO_EXTENT,
    SLAB_ENTRY,
    SLAB_NEXT_OFFSET,
    U16,
    map_entry_offset,
)

_UNUSED: Final = bytes(SLAB_ENTRY.size)


class Extents:
    """Takes and gives back extents of `file`.

    Attributes:
        lock: the space lock.
        looked_at: a byte for each extent: it is known to have no record of before this opening that
            its entry does not know. See `slab`.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self.lock = Lock()
        self.looked_at = bytearray(EXTENT_MAP_ENTRIES)
        # Whether room should be made before the file grows; then there is none, for the time being.
        self.refuses_growth: Callable[[], bool] = _never

    def let_grow(self) -> None:
        """Have the file grow whenever an extent is wanted, for nobody makes room in it."""
        self.refuses_growth = _never

    @property
    def has_free(self) -> bool:
        """Whether an extent can be had, for a slab at least, without growing the file."""
        shorts = self._file.shorts
        return (
            shorts[FREE_EXTENTS_OFFSET >> 1] != NO_EXTENT
            or shorts[FRESH_EXTENT_OFFSET >> 1] < self._file.extent_count
        )

    @property
    def waits_for_flush(self) -> bool:
        """Whether there are free extents that the table may take once everything was flushed."""
        is_any_free = self._file.shorts[FREE_EXTENTS_OFFSET >> 1] != NO_EXTENT
        return is_any_free and self._file.freed_may_come_back

    def allocate(self, rollback: Rollback, *, for_segment: bool = False) -> int:
        """Return the number of an extent that is nobody's. The caller holds `lock`.

        The caller writes its entry in the extent map, through the same `rollback`.

        Raises:
            StoreFullError: there is none, and the file cannot grow.
            CorruptStoreError: the list of free extents leads to one that is not free.
        """
        file = self._file
        extent = file.shorts[FREE_EXTENTS_OFFSET >> 1]
        if extent != NO_EXTENT and not (for_segment and file.freed_may_come_back):
            rollback.write(FREE_EXTENTS_OFFSET, U16.pack(self._after_free(extent)))
            return extent
        extent = file.shorts[FRESH_EXTENT_OFFSET >> 1]
        while extent >= file.extent_count:
            if file.extent_count < file.max_extents and self.refuses_growth():
                raise StoreFullError(f"{file.path}: room is to be made before the file grows")
            self._grow()
        if for_segment:  # it is stored to all at once; a slab's a page now and then
            file.prefault(extent)
        rollback.write(FRESH_EXTENT_OFFSET, U16.pack(extent + 1))
        return extent

    def _grow(self) -> None:
        before = self._file.extent_count
        count = self._file.grow()
        self.looked_at[before : before + count] = b"\1" * count

    def allocate_before(self, limit: int, rollback: Rollback, *, for_segment: bool = True) -> int:
        """As `allocate`, but of the free extents before that number.

        Returns:
            `NO_EXTENT` where there is none, or those there are wait for a flush.
        """
        file, link = self._file, FREE_EXTENTS_OFFSET
        if for_segment and file.freed_may_come_back:
            return NO_EXTENT
        for _ in range(file.extent_count):
            extent = file.shorts[link >> 1]
            if extent == NO_EXTENT:
                return NO_EXTENT
            following = self._after_free(extent)
            if extent < limit:
                rollback.write(link, U16.pack(following))
                return extent
            link = map_entry_offset(extent) + SLAB_NEXT_OFFSET
        raise CorruptStoreError(f"{file.path}: the list of free extents does not end")

    def _after_free(self, extent: int) -> int:
        """Return what follows `extent` on the list of free ones; raise where it cannot be there."""
        self.check(extent)
        entry = SLAB_ENTRY.unpack_from(self._file.map, map_entry_offset(extent))
        if entry[0] != KIND_FREE:
            raise CorruptStoreError(
                f"{self._file.path}: extent {extent} is on the list of free extents, but its "
                f"entry at byte {map_entry_offset(extent):,} says kind {entry[0]}"
            )
        return int(entry[6])

    def free(self, extent: int, rollback: Rollback) -> None:
        """Put `extent` on the list of free ones. The caller holds `lock`; nothing points to it."""
        head = self._file.shorts[FREE_EXTENTS_OFFSET >> 1]
        rollback.write(
            map_entry_offset(extent), SLAB_ENTRY.pack(KIND_FREE, 0, 0, 0, 0, NO_EXTENT, head, 0, 0)
        )
        rollback.write(FREE_EXTENTS_OFFSET, U16.pack(extent))

    def relink_free(self, count: int, rollback: Rollback) -> None:
        """Have the list of free extents be in order, and hold none after the first `count`.

        The caller holds `lock`.
        """
        file = self._file
        # It may be past the end of the file, where that was cut short and is done again.
        fresh = min(file.shorts[FRESH_EXTENT_OFFSET >> 1], EXTENT_MAP_ENTRIES)
        kinds = self.kinds(fresh)
        following = NO_EXTENT
        for extent in range(fresh - 1, FIXED_EXTENTS - 1, -1):
            if kinds[extent] == KIND_FREE:
                entry = _UNUSED
                if extent < count:
                    entry = SLAB_ENTRY.pack(KIND_FREE, 0, 0, 0, 0, NO_EXTENT, following, 0, 0)
                    following = extent
                rollback.write(map_entry_offset(extent), entry)
        rollback.write(FREE_EXTENTS_OFFSET, U16.pack(following))
        if fresh > count:
            rollback.write(FRESH_EXTENT_OFFSET, U16.pack(count))

    def kinds(self, count: int) -> bytes:
        """Return the kinds of the first `count` extents. The caller holds a stripe."""
        return self._file.map[EXTENT_MAP_OFFSET : map_entry_offset(count) : 1 << MAP_ENTRY_SHIFT]

    def check(self, extent: int) -> None:
        """Raise CorruptStoreError for a number, read from the file, that can be no such extent."""
        if not FIXED_EXTENTS <= extent < self._file.extent_count:
            raise CorruptStoreError(
                f"{self._file.path}: a list leads to extent {extent}, which is not among "
                f"{FIXED_EXTENTS} to {self._file.extent_count - 1}"
            )


def _never() -> bool:
    """Return that the file may grow."""
    return False
