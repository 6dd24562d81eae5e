"""Other Python processes that import the same kvstore as this one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import kvstore

# Long enough for the slowest machine; a child that hangs ends the test, nothing waits for it else.
PATIENCE_SECONDS: Final = 120


def environment(**changes: str) -> dict[str, str]:
    """Return an environment for a child: this one, with kvstore importable, and `changes`."""
    package = Path(kvstore.__file__).resolve().parent
    inherited = os.environ.get("PYTHONPATH")
    search = [str(package.parent)] + ([inherited] if inherited else [])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONIOENCODING": "utf-8",
        **changes,
    }


def run_python(code: str, *arguments: object) -> str:
    """Run `code` in a fresh interpreter with warnings as errors; return what it printed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert not finished.stderr
    return finished.stdout


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
