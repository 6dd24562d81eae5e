"""The second half of a rebuild: lay out the table for the records that were found, and write it."""

from array import array
from bisect import bisect_left
from heapq import heapify, heappop, heappush
from itertools import accumulate

from kvstore.compiled import Implementation
from kvstore.errors import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.found_words import found_offset
from kvstore.format.layout import (
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    FOUND_HASH_MASK,
    FOUND_UPPER_SHIFT,
    KIND_SEGMENT,
    MAX_DEPTH,
    MIN_DEPTH,
    NO_EXPIRY,
    REBUILDS_OFFSET,
    RECORD_HEADER_SIZE,
    RECORD_KEY_SIZE_OFFSET,
    RECORD_STAMP_OFFSET,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SPLIT_AT,
    bucket_shape,
    map_entry_offset,
    segment_run,
)
from kvstore.format.segment import MEMBER
from kvstore.index.extents import Extents
from kvstore.index.slab import Slab

from .found_records import FoundRecords
from .report import Report


class NewTable:
    """Writes a fresh table for the records in `found`."""

    def __init__(
        self,
        file: DataFile,
        extents: Extents,
        slab: Slab,
        found: FoundRecords,
        report: Report,
        implementation: Implementation,
    ) -> None:
        self._file = file
        self._extents = extents
        self._slab = slab
        self._found = found
        self._report = report
        self._implementation = implementation

    def write(self) -> None:
        """Write a fresh table for the records that were found."""
        self._found.sort()
        directory = array("H", bytes(2 * DIRECTORY_ENTRIES))
        layout = self._find_room()
        rebuilds = self._file.shorts[REBUILDS_OFFSET >> 1]
        for number, (extent, depth, prefix) in enumerate(layout):
            self._report.show_progress("written", number, len(layout), "segments")
            run = segment_run(depth)
            members = self._members(prefix, run)
            shape = bucket_shape(depth, prefix, rebuilds, 0)
            image, earliest = self._implementation.build_segment(extent, shape, members)
            live = len(members) // MEMBER.size
            self._file.write(extent << EXTENT_SHIFT, image)
            self._file.write(
                map_entry_offset(extent),
                SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, live, live, 0, earliest),
            )
            directory[prefix : prefix + run] = array("H", [extent]) * run
        self._file.write(DIRECTORY_OFFSET, directory.tobytes())

    def _find_room(self) -> list[tuple[int, int, int]]:
        """As `_lay_out`, giving up the newest records where the file may not grow for all of them.

        Raises:
            StoreFullError: the disk has no room for it. It may have at another time.
        """
        extents: list[int] = []
        try:
            return self._lay_out(extents)
        except StoreFullError as error:
            is_at_limit = self._file.extent_count >= self._file.max_extents
            if not is_at_limit or isinstance(error.__cause__, OSError):
                raise
        for extent in extents:
            with self._extents.lock, Rollback(self._file) as rollback:
                self._extents.free(extent, rollback)
        self._give_up_newest(len(extents))
        return self._lay_out([])

    def _give_up_newest(self, room: int) -> None:
        """Free the records that were created last, so that `room` extents do for the others.

        Together with the extents that this empties.
        """
        words, found = self._file.words, self._found
        times, entries = array("Q"), array("H")
        oldest: dict[int, int] = {}
        for word in found.words:
            offset = found_offset(word)
            created_at = words[offset + RECORD_STAMP_OFFSET >> 3]
            times.append(created_at)
            entries.append(word >> DIRECTORY_SHIFT)
            extent = offset >> EXTENT_SHIFT
            oldest[extent] = min(created_at, oldest.get(extent, created_at))

        def is_too_late(last: int) -> bool:
            counts = [0] * DIRECTORY_ENTRIES
            for created_at, entry in zip(times, entries, strict=True):
                counts[entry] += created_at <= last
            sums = list(accumulate(counts, initial=0))
            run = segment_run(MIN_DEPTH)
            needed = sum(_least(sums, start, run) for start in range(0, DIRECTORY_ENTRIES, run))
            return needed > room + sum(first > last for first in oldest.values())

        moments = sorted(set(times))
        first = moments[bisect_left(moments, True, key=is_too_late)]
        given_up = {
            word
            for word in found.words
            if words[found_offset(word) + RECORD_STAMP_OFFSET >> 3] >= first
        }
        for word in sorted(given_up):
            self._slab.free(found_offset(word))
        self._slab.free_spare()
        found.forget(given_up)
        self._report.records -= len(given_up)
        self._report.given_up += len(given_up)

    def _lay_out(self, extents: list[int]) -> list[tuple[int, int, int]]:
        """Cut the hashes into segments; return the extent, depth and prefix of each, in order.

        The fullest are halved first. Where extents run out, the others are filled beyond 7/8. Those
        that it takes it puts in `extents`.
        """
        run = segment_run(MIN_DEPTH)
        waiting = [
            (-self._found.count(prefix, run), MIN_DEPTH, prefix)
            for prefix in range(0, DIRECTORY_ENTRIES, run)
        ]
        heapify(waiting)
        while len(extents) < len(waiting):
            extents.append(self._take_extent())
        segments: list[tuple[int, int]] = []
        while waiting:
            negative_count, depth, prefix = heappop(waiting)
            if -negative_count > SPLIT_AT and depth < MAX_DEPTH:
                try:
                    extents.append(self._take_extent())
                except StoreFullError:
                    if -negative_count > SEGMENT_SLOTS:
                        raise
                else:
                    half = segment_run(depth + 1)
                    for start in (prefix, prefix + half):
                        heappush(waiting, (-self._found.count(start, half), depth + 1, start))
                    continue
            segments.append((prefix, depth))
        return [
            (extent, depth, prefix)
            for extent, (prefix, depth) in zip(sorted(extents), sorted(segments), strict=True)
        ]

    def _take_extent(self) -> int:
        with self._extents.lock, Rollback(self._file) as rollback:
            extent = self._extents.allocate(rollback)
            rollback.write(
                map_entry_offset(extent), SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, 0, 0, 0, NO_EXPIRY)
            )
        return extent

    def _members(self, prefix: int, run: int) -> bytes:
        """Return the members that become of the records of `run` directory entries."""
        words = self._found.words[self._found.slice_of(prefix, run)]
        if self._implementation.has_equal_hashes(words):
            words = self._keep_newest(words)
        if len(words) > SEGMENT_SLOTS:
            self._report.unplaced += len(words) - SEGMENT_SLOTS
            self._file.require_rebuild()
        return self._implementation.members_of_words(
            self._file.map, self._file.size, words[:SEGMENT_SLOTS]
        )

    def _keep_newest(self, words: "array[int]") -> "array[int]":
        """Return the words without those of records that have a newer one of the same key.

        Only operations that were never flushed can have left both.
        """
        kept = array("Q")
        for word in words:
            kept.append(word)
            self._settle_last(kept)
        return kept

    def _settle_last(self, words: "array[int]") -> None:
        """Where the last word is of the same key as one shortly before it, keep the newer."""
        word = words[-1]
        for index in range(len(words) - 2, -1, -1):
            other = words[index]
            if (other ^ word) >> FOUND_UPPER_SHIFT:
                return
            if not (other ^ word) & FOUND_HASH_MASK and self._key(other) == self._key(word):
                is_newer = self._created_at(other) < self._created_at(word)
                self._slab.free(found_offset(words.pop(index if is_newer else -1)))
                self._report.records -= 1
                self._report.outdated += 1
                return

    def _key(self, word: int) -> bytes:
        offset = found_offset(word)
        start = offset + RECORD_HEADER_SIZE
        return self._file.map[start : start + self._file.map[offset + RECORD_KEY_SIZE_OFFSET]]

    def _created_at(self, word: int) -> int:
        return self._file.words[found_offset(word) + RECORD_STAMP_OFFSET >> 3]


def _least(sums: list[int], start: int, run: int) -> int:
    """Return how many segments the records of `run` directory entries need at least.

    `sums` has, for each entry, how many records lead to those before it.
    """
    if run == 1 or sums[start + run] - sums[start] <= SEGMENT_SLOTS:
        return 1
    half = run // 2
    return _least(sums, start, half) + _least(sums, start + half, half)
