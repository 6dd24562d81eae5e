"""What the next opening of a file would do, asked of the store's own code; nothing is changed."""

import os
from enum import Enum

from kvstore import CorruptStoreError, UnsupportedFormatError
from kvstore.file.datafile import DataFile


class Opening(Enum):
    """What the next opening does with a file."""

    USES = "uses its index"
    REBUILDS = "rebuilds its index"
    REFUSES = "refuses it"


class _Question(DataFile):
    """The questions that an opening asks before it changes a byte, and nothing after them."""

    def __init__(self, path: str, fd: int) -> None:  # not DataFile's, which opens and changes
        self.path = path
        self._fd = fd

    def answer(self) -> Opening:
        """Return what comes of an opening; it reads all of a file that it does not trust."""
        try:
            if not self._load_identity():
                return Opening.REBUILDS  # nothing is in it: a new store is made
            size = self._load_state()
            self.distrust = self._find_distrust(size)
            self.trusted = self._clean and not self.distrust
            if not self.trusted:
                self._check_records(size)
        except (CorruptStoreError, UnsupportedFormatError):
            return Opening.REFUSES
        return Opening.USES if self.trusted else Opening.REBUILDS


def next_opening(path: str | os.PathLike[str], fd: int) -> Opening:
    """Return what the next opening does with the file that is open for reading as `fd`.

    Nobody may be changing it meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    return _Question(os.fspath(path), fd).answer()
