"""Other Python processes that import the same kvstore as this one, and cannot outlive the test.

`run_python` runs code to its end; `Child` runs a script that talks with the test, a line at a time.

A child has a watchdog: one that says nothing for `PATIENCE_SECONDS` is killed and fails the test.
Nothing else depends on time.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

import kvstore

# Long enough for the slowest machine; a child that hangs ends the test, nothing waits for it else.
PATIENCE_SECONDS: Final = 120


_TESTS: Final = str(Path(__file__).resolve().parent.parent)

# What most scripts begin with. `say` and `hear` are the child's ends of `Child.hear` and `say`.
_PRELUDE: Final = """
import faulthandler, gc, os, signal, sys
import kvstore
from kvstore import *
faulthandler.enable()

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def hear():
    line = bytearray()
    while not line.endswith(b"\\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    return line.decode().rstrip("\\n")

def try_open(path, **options):
    try:
        store = KVStore(path, **options)
    except StoreLockedError as error:
        return f"locked: {error}"
    store.close()
    return "opened"
"""


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


class ChildFailed(AssertionError):
    """A child ended in a way that the test did not expect; the message holds its errors."""


class Child:
    """A Python process that runs `script`, with the arguments as `sys.argv[1:]`.

    `prelude` comes before the script; `changes` are made to the environment.

    Use as a context manager: where the block leaves the child running, it is killed, by its id, and
    in any case waited for.
    """

    def __init__(
        self, script: str, *arguments: object, prelude: str = _PRELUDE, **changes: str
    ) -> None:
        code = prelude + textwrap.dedent(script)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._heard = b""
        inherited = environment(**changes)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**inherited, "PYTHONPATH": inherited["PYTHONPATH"] + os.pathsep + _TESTS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._errors.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: str = "") -> None:
        """Send the child a line; it gets it from `hear()`."""
        self._stdin.write(line.encode() + b"\n")

    def hear(self) -> str:
        """Return the next line that the child says."""
        while b"\n" not in self._heard:
            if not self._read_more():
                self._fail("ended before it said what was expected")
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode()

    def expect(self, line: str) -> None:
        """Wait for the next line, which must be this one."""
        heard = self.hear()
        assert heard == line, f"the child said {heard!r}, expected {line!r}"

    def end(self) -> str:
        """Close the child's input, wait for its end, and return what it said and was not heard.

        Raises:
            ChildFailed: it ended with an exit code, or by a signal.
        """
        self._stdin.close()
        while self._read_more():
            pass
        self.wait()
        if self._process.returncode != 0:
            self._fail("failed")
        return self._heard.decode()

    def errors(self) -> str:
        """Return what it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill it and wait until it is gone. Its own children live on, with its input open."""
        self._process.kill()
        self.wait()

    def stop_listening(self) -> None:
        """Close the child's input, which tells it and its own children to end; wait until all did.

        Their output is one pipe: at its end nobody is left who could write to it.
        """
        self._stdin.close()
        while self._read_more():
            pass

    def wait(self) -> int:
        """Return the exit code, or minus the signal, once it has ended."""
        try:
            return self._process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._fail("hangs at its end", hangs=True)

    def _read_more(self) -> bool:
        block = _read_within(self._stdout.fileno(), PATIENCE_SECONDS)
        if block is None:
            self._fail(f"hangs: not a word in {PATIENCE_SECONDS} seconds", hangs=True)
        self._heard += block
        return bool(block)

    def _fail(self, what: str, *, hangs: bool = False) -> NoReturn:
        if hangs and os.name == "posix":
            # faulthandler writes where every thread is, then lets the child die.
            self._process.send_signal(signal.SIGABRT)
        elif hangs:
            self._process.kill()
        code = self._process.wait(PATIENCE_SECONDS)
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise ChildFailed(
            f"child {self.pid} {what} ({ended})\n"
            f"--- said, not heard\n{self._heard[-4000:].decode(errors='replace')}\n"
            f"--- its errors\n{self.errors()[-8000:]}"
        )


def _read_within(pipe: int, seconds: float) -> bytes | None:
    """Return what is in a pipe once anything is, nothing at its end; None after so many seconds."""
    if os.name == "posix":
        ready, _, _ = select.select([pipe], [], [], seconds)
        return os.read(pipe, 65_536) if ready else None
    # Windows waits for a pipe only by reading it. A thread that hangs there ends with the child.
    blocks: list[bytes] = []
    reader = threading.Thread(target=lambda: blocks.append(os.read(pipe, 65_536)), daemon=True)
    reader.start()
    reader.join(seconds)
    return blocks[0] if blocks else None


def run_script(script: str, *arguments: object, prelude: str = _PRELUDE, **changes: str) -> str:
    """Run `script` in a child to its end and return what it said."""
    with Child(script, *arguments, prelude=prelude, **changes) as child:
        return child.end()
