"""Many processes that want one file at the same moment. Run in a child, for they are forked."""

import os
import sys
import traceback
from pathlib import Path

from kvstore import KVStore, StoreLockedError


def race(path: str, racers: int, timeout: float) -> list[str]:
    """Fork processes, let all open the file at once, and return what became of each.

    "held": it had the file for itself, found it whole, and stored a key of its own. "locked": it
    was refused. Anything else is a failure.
    """
    start_read, start_write = os.pipe()
    said_read, said_write = os.pipe()
    pids = []
    for racer in range(racers):
        pid = os.fork()
        if pid == 0:
            os.close(start_write)
            os.read(start_read, 1)  # until the last writer is gone
            try:
                said = _run_once(path, racer, timeout)
            except BaseException as error:
                traceback.print_exc()
                said = f"failed: {type(error).__name__}: {error}"
            os.write(said_write, said[:200].replace("\n", " ").encode() + b"\n")
            sys.stderr.flush()
            os._exit(0)
        pids.append(pid)
    os.close(start_read)
    os.close(said_write)
    os.close(start_write)
    with open(said_read, encoding="utf-8") as said_by_all:
        outcomes = said_by_all.read().splitlines()
    for pid in pids:
        os.waitpid(pid, 0)
    return outcomes


def _run_once(path: str, racer: int, timeout: float) -> str:
    marker = Path(path).with_suffix(".in-use")
    try:
        store = KVStore(path, timeout=timeout)
    except StoreLockedError:
        return "locked"
    with store:
        # Exclusive creation fails where a second process believes that it has the file as well.
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        contents = dict(store)
        assert all(value == {"racer": key} for key, value in contents.items()), contents
        assert len(store) == len(contents)
        store.create(str(racer), {"racer": str(racer)})
        marker.unlink()
    return "held"
