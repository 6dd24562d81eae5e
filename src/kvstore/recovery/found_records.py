"""The records that recovery has found, as words that sort by hash: see `format.found_words`.

It takes 8 bytes of memory a record.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from kvstore.compiled import Implementation
from kvstore.format.extent_records import FoundBlocks
from kvstore.format.layout import DIRECTORY_ENTRIES, DIRECTORY_SHIFT, FOUND_UPPER_SHIFT

_PART: Final = 2048  # words that are looked at together: few, for one in doubt delays all of them


class FoundRecords:
    """Collects words, extent by extent, then sorts them and tells which lead to a segment.

    Attributes:
        words: all of them, once they are sorted.
    """

    def __init__(self, implementation: Implementation) -> None:
        self._implementation = implementation
        self._by_extent: list[array[int]] = []
        # Of each directory entry, whether a record of it is in doubt without another of its key.
        self._doubtful = bytearray(DIRECTORY_ENTRIES)
        self.words = array("Q")

    def add(self, blocks: FoundBlocks) -> None:
        """Add the records of an extent."""
        self._by_extent.append(blocks.words)
        for word in blocks.doubtful:
            self._doubtful[word >> DIRECTORY_SHIFT] = True

    def sort(self) -> None:
        """Put all in order, once the last one was added."""
        self.words = self._implementation.sort_words(self._by_extent)

    def parts(self) -> "Iterator[tuple[array[int], bool]]":
        """Yield all words in order, a part at a time, and whether any of these is in doubt.

        It is where it is said to be so, or where two are of one hash, as far as they have it. All
        of one hash are in one part.
        """
        words, count = self.words, len(self.words)
        start = 0
        while start < count:
            end = min(start + _PART, count)
            last = words[end - 1] >> FOUND_UPPER_SHIFT
            while end < count and words[end] >> FOUND_UPPER_SHIFT == last:
                end += 1
            part = words[start:end]
            first_entry, last_entry = part[0] >> DIRECTORY_SHIFT, part[-1] >> DIRECTORY_SHIFT
            yield (
                part,
                self._doubtful.find(True, first_entry, last_entry + 1) >= 0
                or self._implementation.has_equal_hashes(part),
            )
            start = end

    def slice_of(self, prefix: int, run: int) -> slice:
        """Return where those are that lead to `run` directory entries from `prefix` on."""
        words = self.words
        start = bisect_left(words, prefix << DIRECTORY_SHIFT)
        return slice(start, bisect_left(words, prefix + run << DIRECTORY_SHIFT, start))

    def count(self, prefix: int, run: int) -> int:
        """Return how many lead to `run` directory entries from `prefix` on."""
        where = self.slice_of(prefix, run)
        return int(where.stop - where.start)
