"""Moving: the records of an extent go to others of its class, so that the extent becomes free.

A record that moves is superseded by a copy of itself: see `Changes.move`. So its old block is free
only after a flush, unless nobody was promised it; whoever moves is `reclaiming`, many extents to a
flush.

First an extent goes to the end of its class's list: blocks of the others are taken before its own,
and what is freed in it stays free. No lock is held from one record to the next; each step holds a
stripe at the least: `clear` makes the index anew, and cuts the file, with all of them held.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from .changes import Changes
from .errors import CorruptStoreError
from .file.datafile import DataFile
from .format.layout import (
    BLOCK_SIZES,
    ENTRY_CLASS_SHIFT,
    ENTRY_KIND_MASK,
    ENTRY_LIVE_SHIFT,
    EXTENT_SHIFT,
    KIND_SLAB,
    MAX_EXTENTS,
    STRIPE_SHIFT,
    key_hash,
    map_entry_offset,
)
from .index.records import Records
from .index.slab import NoOtherBlockError, Slab
from .index.sparse import Sparse, find_sparse
from .locks import StoreLocks, Turns

if TYPE_CHECKING:
    from .compiled.interface import FastPath

# How many records are moved before other threads may get their turn.
_AT_A_TIME: Final = 128


class Mover:
    """Moves records of a store. Whoever calls it is reclaiming, and has marked the file dirty.

    Attributes:
        searches: how often it has looked for extents to empty.
    """

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        slab: Slab,
        records: Records,
        changes: Changes,
        fast: "FastPath | None",
    ) -> None:
        self._locks = locks
        self._file = file
        self._words = file.words
        self._slab = slab
        self._records = records
        self._changes = changes
        self._fast = fast
        # Extents with records that cannot be moved, and how many records were live in each then.
        self._stuck: dict[int, int] = {}
        self._turns = Turns()
        self.searches = 0
        self._found: list[tuple[int, int]] = []  # extents that are yet to be emptied, best last

    def choose(self, most: int, most_moved: int) -> tuple[list[int], int]:
        """Choose extents to empty, at the most so many, and with so many bytes of records.

        At least one, if there is one; else return how many bytes have to be freed before that.
        """
        missing = 0
        if not self._found:
            self._found, missing = self._find()
            self._found.reverse()
        chosen: list[int] = []
        while self._found and len(chosen) < most:
            moved, extent = self._found[-1]
            if chosen and moved > most_moved:
                break
            most_moved -= moved
            chosen.append(extent)
            self._found.pop()
        return chosen, missing

    def _find(self) -> Sparse:
        self.searches += 1
        for extent, live in list(self._stuck.items()):
            if self._live(extent) != live:
                del self._stuck[extent]
        return find_sparse(self._file, self._stuck)

    def evacuate(self, extents: list[int], limit: int = MAX_EXTENTS) -> None:
        """Move the records of these extents to others of their classes, as far as there is room.

        With a `limit` only to extents before that, opened for it where none has room.

        Raises:
            StoreClosedError: the store is closed.
            StoreFullError, OSError: the disk refused a write.
        """
        self._locks.while_open(lambda: self._slab.put_last(extents))
        for extent in extents:
            is_empty = False
            with suppress(CorruptStoreError):
                is_empty = self._empty(extent, limit)
            if not is_empty:
                self._stuck[extent] = self._live(extent)

    def _empty(self, extent: int, limit: int) -> bool:
        """Move what can be moved; return False where a record is in the way."""
        all_moved = True
        place = extent << EXTENT_SHIFT
        end = place + (1 << EXTENT_SHIFT)
        while place < end:
            most = _AT_A_TIME
            if limit < MAX_EXTENTS:
                size_class = self._words[map_entry_offset(extent) >> 3] >> ENTRY_CLASS_SHIFT & 0xFF
                most = min(most, self._room_before(size_class, limit))
                if not most:
                    return True
            after = place if self._fast is None else self._fast.move(place, most)
            if after == place:
                try:
                    all_moved = self._move(place) and all_moved
                except NoOtherBlockError:
                    return True
                after = self._next_block(place)
            else:
                self._turns.give()
            place = after
        return all_moved

    def _room_before(self, size_class: int, limit: int) -> int:
        return self._locks.while_open(lambda: self._slab.room_before(size_class, limit))

    def _live(self, extent: int) -> int:
        return self._words[map_entry_offset(extent) >> 3] >> ENTRY_LIVE_SHIFT & 0xFFFF

    def _next_block(self, place: int) -> int:
        """Return where the next block of an extent is; the end of it where there is none."""
        extent = place >> EXTENT_SHIFT
        entry = self._words[map_entry_offset(extent) >> 3]
        if entry & ENTRY_KIND_MASK != KIND_SLAB:  # by now
            return extent + 1 << EXTENT_SHIFT
        size = BLOCK_SIZES[entry >> ENTRY_CLASS_SHIFT & 0xFF]
        after = place + size
        return after if after + size <= extent + 1 << EXTENT_SHIFT else extent + 1 << EXTENT_SHIFT

    def _move(self, record: int) -> bool:
        """Move what is in a block, by itself; return False where it is a record that stays."""
        key = self._locks.while_open(lambda: self._records.live_key_at(record))
        if not key:
            return True
        hash_of_key = key_hash(key, self._file.hash_seed)
        with self._locks.stripes[hash_of_key >> STRIPE_SHIFT]:
            if self._locks.closed:
                self._locks.raise_closed()
            # It may have gone in between.
            if self._records.live_key_at(record) != key:
                return True
            try:
                return self._changes.move(record, hash_of_key, key)
            except CorruptStoreError:
                return False
