"""The operations on all keys: counting them, listing them, taking back what has expired."""

from collections.abc import Iterator
from typing import Final

from . import clock
from .errors import CorruptStoreError, KVStoreError
from .file.datafile import DataFile
from .format.layout import (
    DIRECTORY_ENTRIES,
    EXTENT_SHIFT,
    FIRST_FILE_SIZE,
    FIXED_EXTENTS,
    SEGMENT_SLOTS,
    STRIPE_COUNT,
)
from .index.extents import Extents
from .index.segments import Segments
from .index.slab import Slab
from .index.stats import StoreStats, count_extents
from .index.versions import Versions
from .locks import StoreLocks, Turns, operation

_DIRECTORY_PER_STRIPE: Final = DIRECTORY_ENTRIES // STRIPE_COUNT
# How many segments are looked at before other threads may get their turn.
_AT_A_TIME: Final = 64
# How many records are purged at once where somebody waits for room.
_PURGED_AT_ONCE: Final = 2000


class AllKeys:
    """The operations on all keys of a store, and on its space."""

    def __init__(
        self,
        locks: StoreLocks,
        file: DataFile,
        extents: Extents,
        slab: Slab,
        segments: Segments,
        versions: Versions,
        *,
        max_bytes: int,
        durable: bool,
    ) -> None:
        self._locks = locks
        self._file = file
        self._extents = extents
        self._slab = slab
        self._segments = segments
        self._versions = versions
        self._max_bytes = max_bytes
        self._durable = durable
        self._found_at = 0  # the position of a segment where a key was found
        # Nothing has expired at these moments that was not taken back.
        self._purged = range(0)
        # Where `_purge` goes on, when it began, and when the next expires as far as it has come.
        self._purge_position, self._purging = 0, (0, 0)
        self._merge_position = 0  # where `merge_some` goes on

    # --- at one moment -------------------------------------------------------------------------

    @operation(flushes=False)
    def count(self) -> int:
        """Return the number of keys that have not expired, all at one moment."""
        return self._locks.with_all_stripes(self._count)

    def _count(self) -> int:
        if self._locks.closed:
            self._locks.raise_closed()
        now_ms = clock.now_ms()
        return sum(
            self._segments.count(extent, now_ms)
            for number in range(STRIPE_COUNT)
            for extent in self._segments.segments(number)
        )

    @operation(flushes=False)
    def stats(self) -> StoreStats:
        """Count what is in the file, all at one moment."""
        return self._locks.with_all_stripes(self._count_extents)

    def _count_extents(self) -> StoreStats:
        if self._locks.closed:
            self._locks.raise_closed()
        with self._locks.space:
            return count_extents(self._file, self._max_bytes)

    @operation(flushes=True)
    def clear(self) -> None:
        """Remove all keys, and cut the file to the length of a new one."""
        if self._file.pristine:
            self._locks.mark_dirty()
        self._locks.flush_alone(self._clear)

    def _clear(self) -> None:
        if self._locks.closed:
            self._locks.raise_closed()
        try:
            self._empty()
        except (KVStoreError, OSError):
            raise
        except BaseException:
            self._empty()  # what was begun is ended
            raise

    def _empty(self) -> None:
        versions, file = self._versions, self._file
        # In this one step no record counts any more: see `layout`, "Superblock".
        file.cut(FIRST_FILE_SIZE >> EXTENT_SHIFT, void_stamp=versions.latest_stamp)
        try:
            first = FIXED_EXTENTS << EXTENT_SHIFT
            file.write(first, bytes(file.size - first))
            self._rebuild()
            versions.start_after(versions.latest_stamp, clock.now_ms())
            file.set_void_stamp(0)
        except (KVStoreError, OSError) as error:
            file.make_read_only(error)
            raise

    def _rebuild(self) -> None:
        from .recovery.rebuild import rebuild  # as in opening

        rebuild(self._file, self._extents, clock.now_ms())
        self._slab.index_rebuilt()
        self._segments.index_rebuilt()
        self._found_at = self._purge_position = 0
        self._purged = range(0)

    # --- segment by segment --------------------------------------------------------------------

    @operation(flushes=False)
    def any_key(self) -> str | None:
        """Return some key that is there; None where there is none.

        Raises:
            CorruptStoreError: damage hides whether there is one.
        """
        start, damage = self._found_at, ""
        for first in (start, 0):
            position = first
            while position < (DIRECTORY_ENTRIES if first == start else start):
                with self._locks.stripes[position // _DIRECTORY_PER_STRIPE]:
                    if self._locks.closed:
                        self._locks.raise_closed()
                    key, following, found = self._segments.any_key(position, clock.now_ms())
                if key is not None:
                    self._found_at = position
                    return key
                position, damage = following, damage or found
        if damage:
            raise CorruptStoreError(damage)
        return None

    def iterate(self, _store: object) -> Iterator[str]:
        """Yield the keys, and keep `_store` from being collected, and so closed, until the end.

        Raises:
            CorruptStoreError: after all keys that can be told, where damage hides others.
        """
        # Segments split and merge meanwhile. Those before the position have been told of.
        position = 0
        damage: list[str] = []
        while position < DIRECTORY_ENTRIES:
            keys, position, found = self._keys_at(position)
            damage += found
            for key in keys:
                try:
                    yield key.decode()
                except UnicodeDecodeError as error:
                    damage.append(f"{self._file.path}: a slot's key is no UTF-8: {error}")
        if damage:
            raise CorruptStoreError(
                f"{damage[0]}; keys may be missing from the iteration that ends here "
                f"(findings: {len(damage)})"
            )

    @operation(flushes=False)
    def _keys_at(self, position: int) -> tuple[list[bytes], int, list[str]]:
        with self._locks.stripes[position // _DIRECTORY_PER_STRIPE]:
            if self._locks.closed:
                self._locks.raise_closed()
            return self._segments.segment_keys(position, clock.now_ms())

    @operation(flushes=False)
    def copy_segment(self, position: int) -> tuple[bytes, dict[int, bytes], range]:
        """As `Segments.copy_segment`, which is soon done."""
        with self._locks.stripes[position // _DIRECTORY_PER_STRIPE]:
            if self._locks.closed:
                self._locks.raise_closed()
            return self._segments.copy_segment(position)

    @operation(flushes=True)
    def purge_expired(self) -> int:
        """Take back the space of expired records and return their number."""
        return self._purge()

    def is_purged(self) -> bool:
        """Return whether all was taken back that has expired by now, as far as is known.

        The caller holds a stripe.
        """
        from .index.sparse import count_usage  # where room is made only

        now_ms = clock.now_ms()
        if now_ms not in self._purged:
            # What is stored from now on lives for a second at the least.
            self._purged = range(now_ms, min(count_usage(self._file).earliest, now_ms + 1000))
        return now_ms in self._purged

    def purge_all(self) -> None:
        """As `purge_expired`, for a caller who is inside an operation that flushes."""
        self._purge()

    def purge_some(self) -> int:
        """Purge some records, on from where the last call ended; 0 once all are purged.

        The caller is inside an operation that flushes, and holds no lock.
        """
        return 0 if self._locks.while_open(self.is_purged) else self._purge(_PURGED_AT_ONCE)

    def _purge(self, most: int | None = None) -> int:
        """Purge all that has expired; or `most` records or some more, on from where that ended.

        Damaged segments stay as they are. They are told of at the end, but where `most` is given:
        the room is needed whatever else there is to be said.
        """
        purged = position = 0
        damage: CorruptStoreError | None = None
        now_ms = clock.now_ms()
        # What is stored from now on lives for a second at the least.
        earliest = now_ms + 1000
        if most is not None and self._purge_position:
            position, now_ms, earliest = self._purge_position, *self._purging
        while position < DIRECTORY_ENTRIES and (most is None or purged < most):
            number = position // _DIRECTORY_PER_STRIPE
            # One segment under the stripe at a time: others get their turn in between.
            with self._locks.stripes[number]:
                if self._locks.closed:
                    self._locks.raise_closed()
                try:
                    extent, following, due = self._segments.segment_expiry(position, clock.now_ms())
                    soonest = self._segments.earliest_expiry(extent)
                except CorruptStoreError as error:
                    following, due = self._segments.end_of_run(position), False
                    damage, soonest = damage or error, earliest
            if due:
                if self._file.pristine:
                    self._locks.mark_dirty()
                try:
                    count, soonest = self._purge_segment(number, position)
                    purged += count
                except CorruptStoreError as error:
                    damage, soonest = damage or error, earliest
            position, earliest = following, min(earliest, soonest)
        if position == DIRECTORY_ENTRIES:
            self._purged = range(now_ms, earliest)
            position = 0
        if most is not None:
            self._purge_position, self._purging = position, (now_ms, earliest)
        if purged and self._durable:
            self._file.flush()
        if damage is not None and most is None:
            raise damage
        return purged

    def _purge_segment(self, stripe: int, position: int) -> tuple[int, int]:
        """Return how many were purged, and when the next of its records expires."""
        with self._locks.stripes[stripe]:
            if self._locks.closed:
                self._locks.raise_closed()
            try:
                # The time anew: what was created after the clock was set back has not expired by
                # an earlier reading of it.
                extent = self._file.directory[position]
                purged = self._segments.purge(extent, clock.now_ms())
                return purged, self._segments.earliest_expiry(extent)
            except KVStoreError:
                raise
            except BaseException:
                self._file.require_rebuild()
                raise

    @operation(flushes=True)
    def merge_segments(self) -> int:
        """Merge what can be of the table's segments; return how many extents became free.

        Damaged segments stay as they are.

        Raises:
            StoreFullError, OSError: the disk refused a write.
        """
        return self.merge_some(DIRECTORY_ENTRIES)

    def merge_some(
        self,
        most: int,
        live: int = SEGMENT_SLOTS // 2,
        most_looked_at: int = DIRECTORY_ENTRIES,
    ) -> int:
        """As `merge_segments`, at the most so many, to segments of at most `live` live slots.

        On from where the last call ended, round and round: at the most so many are looked at, each
        once. The caller is inside an operation that flushes, and holds no lock.
        """
        merged = looked_at = passed = 0
        position = self._merge_position
        turns = Turns()
        while passed < DIRECTORY_ENTRIES and merged < most and looked_at < most_looked_at:
            looked_at += 1
            number = position // _DIRECTORY_PER_STRIPE
            # One segment, or two, under the stripe at a time: others get their turn in between.
            with self._locks.stripes[number]:
                if self._locks.closed:
                    self._locks.raise_closed()
                is_mergeable, following = self._segments.is_mergeable(position, live)
            if is_mergeable:
                if self._file.pristine:
                    self._locks.mark_dirty()
                if self._merge_segment(number, position, live):
                    merged += 1
                    following = position  # what they became may have a buddy now
            if is_mergeable or looked_at % _AT_A_TIME == 0:
                turns.give()
            passed += following - position
            position = following % DIRECTORY_ENTRIES
        self._merge_position = position
        return merged

    def _merge_segment(self, stripe: int, position: int, live: int) -> bool:
        with self._locks.stripes[stripe]:
            if self._locks.closed:
                self._locks.raise_closed()
            try:
                return self._segments.merge(position, clock.now_ms(), live)
            except CorruptStoreError:
                return False
            except KVStoreError:
                raise
            except BaseException:
                self._file.require_rebuild()
                raise
