"""`python -m kvstore`: in this process, or in one of its own where the promise is about that."""

import io
import os
import subprocess
import sys
from unittest import mock

from kvstore.__main__ import main

from .processes import PATIENCE_SECONDS, environment


def run_here(
    *arguments: object, stdin: str = "", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run the command with these arguments in this process, with `changes` to the environment."""
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with (
        mock.patch.dict(os.environ, changes),
        mock.patch.multiple(sys, stdin=given, stdout=out, stderr=error),
    ):
        status = main([str(each) for each in arguments])
    printed = []
    for stream in (out, error):
        stream.seek(0)
        printed.append(stream.read())
    return subprocess.CompletedProcess([str(each) for each in arguments], status, *printed)


def start_command(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    """Start `python -m kvstore` with these arguments, its three streams piped."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "kvstore", *map(str, arguments)],
        env=environment(**changes),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run_command(
    *arguments: object, stdin: str = "", **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m kvstore` with these arguments to its end."""
    with start_command(*arguments, **changes) as process:
        try:
            out, error = process.communicate(stdin, timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)
