"""What is said of a file that is not on a local disk: by the line that opened the store, once."""

import sys
import warnings
from typing import Final

from .platform import system

_PACKAGE: Final = f"{__name__.partition('.')[0]}."
_warned: Final[set[str]] = set()


def warn_if_remote(fd: int, path: str) -> None:
    """Warn, once for each path, where the file system is none that can keep the store's promises.

    Raises:
        RuntimeWarning: the program has warnings raised.
    """
    kind = system.remote_kind(fd)
    if not kind or path in _warned:
        return
    warnings.warn(
        f"{path} is on a file system of type {kind}, which another machine or program serves. Not "
        f"promised there: that the lock keeps every other process out, that what was flushed "
        f"survives a loss of power, and that this process survives a loss of the connection. Keep "
        f"the store on a local disk, and only copies of it (backup) there",
        RuntimeWarning,
        stacklevel=_levels_to_caller(),
    )
    _warned.add(path)


def _levels_to_caller() -> int:
    """Return how many levels above the calling function the line is that called this package."""
    levels, frame = 1, sys._getframe(1)
    # Text that is executed need not have a name.
    while frame.f_back is not None and (f"{frame.f_globals.get('__name__')}.".startswith(_PACKAGE)):
        levels, frame = levels + 1, frame.f_back
    return levels
