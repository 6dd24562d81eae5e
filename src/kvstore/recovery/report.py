"""What a rebuild counts, and says of it to the log."""

import logging
from time import monotonic
from typing import Final

from kvstore.file.datafile import DataFile

logger = logging.getLogger("kvstore")

_PROGRESS_SECONDS: Final = 1.0


class Report:
    """The counts of a rebuild of `file`, which its steps add to.

    Attributes:
        records: that are kept.
        expired: dropped, as past their expiry.
        damaged: dropped, as they are not whole.
        first_damaged: offset of the first of these.
        outdated: dropped, as they were superseded by a later one of their key, or removed with all
            others, or most of their extent is of another class.
        deleted: dropped, as they were marked.
        unplaced: kept, but without a slot.
        given_up: dropped, for want of room for their slots.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._started = monotonic()
        self._progress_due = self._started + _PROGRESS_SECONDS
        self.records = 0
        self.expired = 0
        self.damaged = 0
        self.first_damaged = 0
        self.outdated = 0
        self.deleted = 0
        self.unplaced = 0
        self.given_up = 0

    def show_progress(self, what: str, done: int, count: int, things: str) -> None:
        """Log now and then how far a step is."""
        if monotonic() >= self._progress_due:
            self._progress_due = monotonic() + _PROGRESS_SECONDS
            logger.info(
                "%s: recovery has %s %d of %d %s, %d records so far",
                self._file.path,
                what,
                done,
                count,
                things,
                self.records,
            )

    def log(self) -> None:
        """Log what was found; nothing for a new file."""
        if self.records or self.expired or self.deleted or self.damaged or self.outdated:
            logger.warning(
                "%s: %s; rebuilt the index of %d records in %.2f s; "
                "dropped %d expired, %d deleted, %d outdated and %d damaged ones%s",
                self._file.path,
                self._file.distrust,
                self.records,
                monotonic() - self._started,
                self.expired,
                self.deleted,
                self.outdated,
                self.damaged,
                f", the first of these at byte {self.first_damaged:,}" if self.damaged else "",
            )
        if self.given_up:
            logger.error(
                "%s: after power loss, the file at its limit of %d extents had no room for the "
                "slots of all records; gave up the %d newest, which were not synced",
                self._file.path,
                self._file.max_extents,
                self.given_up,
            )
        if self.unplaced:
            logger.error(
                "%s: %d records have no slot, because one entry of the directory is full; delete "
                "others and open the store again",
                self._file.path,
                self.unplaced,
            )
