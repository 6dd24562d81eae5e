"""The inspector, run in this process or in one of its own, and files for it to look at."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import kvstore_inspect
from kvstore import KVStore

from .children import PATIENCE_SECONDS, environment

DONE, PROBLEMS, WRONG_USAGE, LOCKED = 0, 1, 2, 3


class Result(NamedTuple):
    """What a command ended in: exit status, what it printed, what it said beside."""

    status: int
    out: str
    err: str


Inspect = Callable[..., Result]


def inspector(**changes: str) -> dict[str, str]:
    """Return an environment for a child with both packages importable."""
    tools = str(Path(kvstore_inspect.__file__).resolve().parent.parent)
    inherited = environment(**changes)
    return {**inherited, "PYTHONPATH": os.pathsep.join((tools, inherited["PYTHONPATH"]))}


def start_inspector(
    *arguments: object, stdout: int | IO[Any] = subprocess.PIPE, **changes: str
) -> "subprocess.Popen[str]":
    """Start `python -m kvstore_inspect` with its output piped, or to `stdout`."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "kvstore_inspect", *map(str, arguments)],
        env=inspector(**changes),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",
    )


def run_inspector(*arguments: object, **changes: str) -> Result:
    """Run `python -m kvstore_inspect` to its end."""
    with start_inspector(*arguments, stdout=subprocess.PIPE, **changes) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Result(process.returncode, out, err)


def fingerprint(path: Path) -> tuple[str, int, int]:
    """Return what changes when a file does: hash of its bytes, time of its change, mode."""
    status = path.stat()
    return sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns, status.st_mode


def killed_copy(store: KVStore, target: Path) -> Path:
    """Copy the file of an open store: as its process would leave it if it were killed now."""
    shutil.copyfile(store.path, target)
    return target


def flip(path: Path, offset: int) -> None:
    """Change one byte of a closed file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
