"""Tasks for the benchmark's processes, in a module that imports little."""

import os
from pathlib import Path

from engines import OpenEngine
from workers import Say


def tell_implementation(open_engine: OpenEngine, _say: Say, folder: Path) -> str:
    """Return the implementation that the process has, once it has opened a store."""
    open_engine(folder).close()
    from kvstore import IMPLEMENTATION

    return IMPLEMENTATION


def meet_an_end(_open: OpenEngine, say: Say, folder: Path, number: int, trouble: str) -> int:
    """Return the number of the round; in the second one, come to the end that is meant."""
    assert list(folder.iterdir()) == []
    (folder / "file").touch()
    say(f"round {number}")
    if number and trouble == "raise":
        raise RuntimeError("out of\nluck")
    if number and trouble == "die":
        os._exit(7)
    return number
