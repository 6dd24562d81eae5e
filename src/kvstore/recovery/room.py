"""Whether a file at its limit has room for the table of all its records, and what goes where not.

Every file gets its table, whatever power loss has left. Say that everything was last flushed at a
time F, with a table of T extents that held a slot for each key there was then. What the disk may
hold are the records of F, promised, superseded or deleted since, and newer ones, which are promised
to nobody; those that are durable were flushed with a table of their own, whose extents count like
the T. No record is in any extent of that table, for a segment stays one. So the T are left, and
enough for the keys of F. Only all keys together may need more, in a file at its limit: as where old
ones were deleted and new ones created in other blocks, and the disk took the latter but not the
former. Then the newest keys are given up, as few as that takes, by the earliest stamp of all their
records: no key of F is among them, unless the clock was set back since. A process that died has
left one state, for which its table was enough.
"""

from array import array
from bisect import bisect_left
from itertools import accumulate, chain

from kvstore.file.datafile import DataFile
from kvstore.format.found_words import found_offset
from kvstore.format.layout import (
    DIRECTORY_ENTRIES,
    DIRECTORY_SHIFT,
    EXTENT_SHIFT,
    FIXED_EXTENTS,
    FOUND_HASH_MASK,
    MAX_DEPTH,
    MIN_DEPTH,
    RECORD_STAMP_OFFSET,
    SEGMENT_SLOTS,
    segment_run,
)

from .found_records import FoundRecords
from .scan import Scan


class Room:
    """Gives up what of `found`, which are the records that are to stay, has no room for its slots.

    Args:
        file: nothing is changed in it.
        found: what is given up is taken from it.
        scan: knows of each extent how many records are in it.
        losers: records among these that another one of their key outranks, or that are void.
        gone: others among these that do not stay.
    """

    def __init__(
        self,
        file: DataFile,
        found: FoundRecords,
        scan: Scan,
        losers: "array[int]",
        gone: "array[int]",
    ) -> None:
        self._file = file
        self._found = found
        self._losers = losers
        left = {extent: live for extent, (_, live, _, _) in scan.slabs.items()}
        for word in chain(losers, gone):
            left[found_offset(word) >> EXTENT_SHIFT] -= 1
        occupied = sum(map(bool, left.values()))
        self._room = file.max_extents - FIXED_EXTENTS - occupied

    def make(self) -> list[int]:
        """Return the words that are given up, sorted; as a rule there are none."""
        words = self._found.words
        # Whatever is halved, of those of one depth, has more records than a segment has slots.
        halvings = (MAX_DEPTH - MIN_DEPTH) * (len(words) // SEGMENT_SLOTS)
        if (1 << MIN_DEPTH) + halvings <= self._room:
            return []
        stamps = self._earliest_stamps()
        if self._is_enough(2**64 - 1, stamps, {}):
            return []
        earliest: dict[int, int] = {}  # of each extent
        for word, stamp in zip(words, stamps, strict=True):
            extent = found_offset(word) >> EXTENT_SHIFT
            earliest[extent] = min(stamp, earliest.get(extent, stamp))
        moments = sorted(set(stamps))
        first = moments[
            bisect_left(moments, True, key=lambda last: not self._is_enough(last, stamps, earliest))
        ]
        given_up = [word for word, stamp in zip(words, stamps, strict=True) if stamp >= first]
        words[:] = array(
            "Q", (word for word, stamp in zip(words, stamps, strict=True) if stamp < first)
        )
        return given_up

    def _earliest_stamps(self) -> "array[int]":
        """Return for each record that is to stay the earliest stamp of those of its key.

        What is void has none. Two keys whose words have the same hash count as one.
        """
        before: dict[int, int] = {}
        for word in self._losers:
            stamp = self._stamp(word)
            if stamp > self._file.void_stamp:
                hashed = word & FOUND_HASH_MASK
                before[hashed] = min(stamp, before.get(hashed, stamp))
        stamps = array("Q")
        for word in self._found.words:
            stamp = self._stamp(word)
            stamps.append(min(stamp, before.get(word & FOUND_HASH_MASK, stamp)))
        return stamps

    def _stamp(self, word: int) -> int:
        return self._file.words[found_offset(word) + RECORD_STAMP_OFFSET >> 3]

    def _is_enough(self, last: int, stamps: "array[int]", earliest: dict[int, int]) -> bool:
        """Return whether the records with stamps up to `last` have room for their segments.

        Together with the extents that giving up the others empties, by their `earliest` stamps.
        """
        counts = [0] * DIRECTORY_ENTRIES
        for word, stamp in zip(self._found.words, stamps, strict=True):
            counts[word >> DIRECTORY_SHIFT] += stamp <= last
        sums = list(accumulate(counts, initial=0))
        run = segment_run(MIN_DEPTH)
        needed = sum(_least(sums, start, run) for start in range(0, DIRECTORY_ENTRIES, run))
        return needed <= self._room + sum(stamp > last for stamp in earliest.values())


def _least(sums: list[int], start: int, run: int) -> int:
    """Return how many segments the records of `run` directory entries need at least.

    `sums` has, for each entry, how many records lead to those before it.
    """
    if run == 1 or sums[start + run] - sums[start] <= SEGMENT_SLOTS:
        return 1
    half = run // 2
    return _least(sums, start, half) + _least(sums, start + half, half)
