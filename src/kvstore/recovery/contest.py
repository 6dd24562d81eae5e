"""The middle of a rebuild: of the records of each key one is left, or none, and the disk knows it.

See `layout`, "Records that follow each other". In this order, with a flush of everything between
each of these and the next:

1. The file is as it was found. A process that died has left changes that no disk has; among them
   may be the very records that outrank others.
2. Where the table of a full file would not have room for all that is to stay, the newest of that
   are cleared: see `room`. Before the losers: for of a key that is given up the older records must
   still be there, to tell in the next recovery how old the key is.
3. Losers are cleared: those that another one of their key outranks, and those that are void. What
   `scan` has cleared counts as one of these.
4. Winners that are marked or have expired are cleared.
5. The index is built, in extents that may have held any of those.

A step of which there is nothing to do takes no flush; so most recoveries take none here.
"""

from array import array
from collections.abc import Iterable
from typing import Final

from kvstore.compiled import Implementation
from kvstore.file.datafile import DataFile
from kvstore.format.found_words import found_offset
from kvstore.format.layout import EXTENT_SHIFT, GENERATION_SHIFT, MARKED_MAGIC, MOST_GENERATIONS

from .found_records import FoundRecords
from .report import Report
from .room import Room
from .scan import Scan

_GENERATION: Final = MOST_GENERATIONS << GENERATION_SHIFT


class Contest:
    """Clears all records of `found` but the ones that are to have slots, and forgets them."""

    def __init__(
        self,
        file: DataFile,
        found: FoundRecords,
        scan: Scan,
        report: Report,
        now_ms: int,
        implementation: Implementation,
    ) -> None:
        self._file = file
        self._found = found
        self._scan = scan
        self._report = report
        self._now_ms = now_ms
        self._implementation = implementation
        self._touched: set[int] = set()

    def run(self) -> None:
        """Judge all records, clear those that are not to stay, and have the scan know it."""
        file, report = self._file, self._report
        losers, gone = self._judge()
        given_up = Room(file, self._found, self._scan, losers, gone).make()
        if given_up:
            self._flush()
            self._clear(given_up)
            report.given_up += len(given_up)
        if losers or file.void_stamp:
            self._flush()
            self._clear(losers)
            report.outdated += len(losers)
        if gone or file.void_stamp:
            self._flush()
            if not file.in_memory:
                file.set_void_stamp(0)
            self._count_gone(gone)
            self._clear(gone)
        if self._touched:
            self._flush()
        for extent in sorted(self._touched):
            self._scan.look_again(extent)
        report.records = len(self._found.words)

    def _judge(self) -> "tuple[array[int], array[int]]":
        """Leave in `found` the winners that are live; return the losers, and the other winners.

        Where a winner was retired, it is so no more.
        """
        file, words = self._file, self._found.words
        losers, gone = array("Q"), array("Q")
        end = 0
        for part, is_in_doubt in self._found.parts():
            live = part
            if is_in_doubt:
                live, retired, outranked, ended = self._implementation.judge_words(
                    file.map, file.size, part, self._now_ms, file.void_stamp
                )
                losers.extend(outranked)
                gone.extend(ended)
                for word in retired:
                    place = found_offset(word) >> 3
                    file.write_word(place, file.words[place] & ~_GENERATION)
            if is_in_doubt or losers or gone:
                words[end : end + len(live)] = live
            end += len(live)
        del words[end:]
        return losers, gone

    def _clear(self, words: "Iterable[int]") -> None:
        for word in words:
            offset = found_offset(word)
            self._file.write_word(offset >> 3, 0)
            self._touched.add(offset >> EXTENT_SHIFT)

    def _count_gone(self, words: "array[int]") -> None:
        marked = sum(
            self._file.words[found_offset(word) >> 3] & 0xFFFF_FFFF == MARKED_MAGIC
            for word in words
        )
        self._report.deleted += marked
        self._report.expired += len(words) - marked

    def _flush(self) -> None:
        if not self._file.in_memory:
            self._file.flush()
