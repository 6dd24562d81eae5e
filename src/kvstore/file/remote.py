"""What is said of a file that is not on a local disk: by the line that opened the store, once."""

import warnings
from typing import Final

from .caller import levels_to_caller
from .platform import system

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
        stacklevel=levels_to_caller(),
    )
    _warned.add(path)
