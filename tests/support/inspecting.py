"""The inspector, run in this process or in one of its own, and files for it to look at."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import kvstore_inspect
from kvstore import KVStore
from kvstore_inspect.command_line import main

from .processes import PATIENCE_SECONDS, environment

DONE, PROBLEMS, WRONG_USAGE, LOCKED = 0, 1, 2, 3


class Result(NamedTuple):
    """What a command ended in: exit status, what it printed, what it said beside."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Return what it printed, parsed."""
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        """Return each line of what it printed, parsed."""
        return [json.loads(line) for line in self.out.split("\n") if line]


def inspect(*arguments: object) -> Result:
    """Run a command in this process."""
    written, said = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(written, "utf-8", newline="\n", write_through=True)
    err = io.TextIOWrapper(said, "utf-8", newline="\n", write_through=True)
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
        sys.stdout.flush()
    result = Result(status, written.getvalue().decode(), said.getvalue().decode())
    assert "Traceback" not in result.err, result
    assert status == DONE or result.err or result.out, f"{arguments[0]} ended in {status} silently"
    return result


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


def run_in_shell(line: str, *arguments: object) -> Result:
    """Run a shell's line, in which "$@" is the inspector with these arguments."""
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-W", "error", "-m", "kvstore_inspect"]
        + [str(each) for each in arguments],
        env=inspector(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


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
