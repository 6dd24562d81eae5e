"""The records that recovery has found, as words that sort by hash: see `format.found_words`.

It takes 8 bytes of memory a record.
"""

from array import array
from bisect import bisect_left

from kvstore.compiled import Implementation
from kvstore.format.layout import DIRECTORY_SHIFT


class FoundRecords:
    """Collects words, extent by extent, then sorts them and tells which lead to a segment.

    Attributes:
        words: all of them, once they are sorted.
    """

    def __init__(self, implementation: Implementation) -> None:
        self._implementation = implementation
        self._by_extent: list[array[int]] = []
        self.words = array("Q")

    def add(self, words: "array[int]") -> None:
        """Add the words of an extent."""
        self._by_extent.append(words)

    def sort(self) -> None:
        """Put all in order, once the last one was added."""
        self.words = self._implementation.sort_words(self._by_extent)

    def forget(self, words: "set[int]") -> None:
        """Forget these."""
        self.words[:] = array("Q", (word for word in self.words if word not in words))

    def slice_of(self, prefix: int, run: int) -> slice:
        """Return where those are that lead to `run` directory entries from `prefix` on."""
        words = self.words
        start = bisect_left(words, prefix << DIRECTORY_SHIFT)
        return slice(start, bisect_left(words, prefix + run << DIRECTORY_SHIFT, start))

    def count(self, prefix: int, run: int) -> int:
        """Return how many lead to `run` directory entries from `prefix` on."""
        where = self.slice_of(prefix, run)
        return int(where.stop - where.start)
