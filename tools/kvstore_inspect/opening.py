"""What the next opening of a file would do, asked of the store's own code; nothing is changed."""

import os
from enum import Enum

from kvstore import CorruptStoreError, UnsupportedFormatError
from kvstore.file.opening import FoundFile
from kvstore.recovery.opening import decide


class Opening(Enum):
    """What the next opening does with a file."""

    USES = "uses its index"
    REBUILDS = "rebuilds its index"
    REFUSES = "refuses it"


def next_opening(path: str | os.PathLike[str], fd: int) -> Opening:
    """Return what the next opening does with the file that is open for reading as `fd`.

    Nobody may be changing it meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    try:
        found = FoundFile(os.fspath(path), fd)
        # In a blank one a new store is made.
        rebuilds = found.is_blank or bool(decide(found)[0])
    except (CorruptStoreError, UnsupportedFormatError):
        return Opening.REFUSES
    return Opening.REBUILDS if rebuilds else Opening.USES
