"""A Redis or Valkey server of a test's own, where one is installed."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def client() -> str | None:
    """Return the path of the command that talks with a server."""
    return shutil.which("redis-cli") or shutil.which("valkey-cli")


@contextmanager
def server(folder: Path) -> Iterator[Path]:
    """Run one that keeps nothing on disk, and give its socket; skip the test if there is none."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None or client() is None:
        pytest.skip("no Redis or Valkey server is installed")
    folder.mkdir()
    options = ["--port", "0", "--unixsocket", "socket", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([program, *options], stdout=subprocess.PIPE, cwd=folder) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if b"eady to accept connections" in line:
                    break
            yield folder / "socket"
        finally:
            process.terminate()
            process.stdout.read()
