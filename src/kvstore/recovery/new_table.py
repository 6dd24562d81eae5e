"""The last part of a rebuild: lay out the table for the records that stay, and write it."""

from array import array
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from kvstore.compiled import Implementation
from kvstore.errors import StoreFullError
from kvstore.file.datafile import DataFile
from kvstore.file.rollback import Rollback
from kvstore.format.layout import (
    DIRECTORY_ENTRIES,
    DIRECTORY_OFFSET,
    EXTENT_SHIFT,
    KIND_SEGMENT,
    MAX_DEPTH,
    MIN_DEPTH,
    NO_EXPIRY,
    REBUILDS_OFFSET,
    SEGMENT_ENTRY,
    SEGMENT_SLOTS,
    SPLIT_AT,
    bucket_shape,
    map_entry_offset,
    segment_run,
)
from kvstore.index.extents import Extents

from .found_records import FoundRecords
from .report import Report

if TYPE_CHECKING:
    from kvstore.compiled.interface import Members


class NewTable:
    """Writes a fresh table for the records in `found`."""

    def __init__(
        self,
        file: DataFile,
        extents: Extents,
        found: FoundRecords,
        report: Report,
        implementation: Implementation,
    ) -> None:
        self._file = file
        self._extents = extents
        self._found = found
        self._report = report
        self._implementation = implementation

    def write(self) -> None:
        """Write a fresh table for the records that were found.

        Raises:
            StoreFullError: the disk has no room for it. It may have at another time.
        """
        directory = array("H", bytes(2 * DIRECTORY_ENTRIES))
        layout = self._lay_out()
        rebuilds = self._file.shorts[REBUILDS_OFFSET >> 1]
        for number, (extent, depth, prefix) in enumerate(layout):
            self._report.show_progress("written", number, len(layout), "segments")
            run = segment_run(depth)
            members = self._members(prefix, run)
            shape = bucket_shape(depth, prefix, rebuilds, 0)
            image, earliest = self._implementation.build_segment(extent, shape, members)
            live = self._implementation.count_members(members)
            self._file.write(extent << EXTENT_SHIFT, image)
            self._file.write(
                map_entry_offset(extent),
                SEGMENT_ENTRY.pack(KIND_SEGMENT, 0, live, live, 0, earliest),
            )
            directory[prefix : prefix + run] = array("H", [extent]) * run
        self._file.write(DIRECTORY_OFFSET, directory.tobytes())

    def _lay_out(self) -> list[tuple[int, int, int]]:
        """Cut the hashes into segments; return the extent, depth and prefix of each, in order.

        The fullest are halved first. Where extents run out, the others are filled beyond 7/8.
        """
        extents: list[int] = []
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

    def _members(self, prefix: int, run: int) -> "Members":
        """Return the members that become of the records of `run` directory entries."""
        words = self._found.words[self._found.slice_of(prefix, run)]
        if len(words) > SEGMENT_SLOTS:
            self._report.unplaced += len(words) - SEGMENT_SLOTS
            self._file.require_rebuild()
        return self._implementation.members_of_words(
            self._file.map, self._file.size, words[:SEGMENT_SLOTS]
        )
