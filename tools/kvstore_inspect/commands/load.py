"""`load`: what `dump` wrote, or `redis-cli` says, into a new or an existing store."""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Final, NamedTuple

import click

from kvstore import KeyExistsError, KVStore, StoreFullError
from kvstore.clock import now_ms
from kvstore.format.layout import MAX_FILE_SIZE, MIN_MAX_BYTES
from kvstore_inspect import redis_cli
from kvstore_inspect.jsonl import LONGEST_LINE, MalformedLineError, from_line
from kvstore_inspect.records import Record
from kvstore_inspect.redis_cli import UnfitError, from_replies
from kvstore_inspect.terminal import escaped, progress, say

from .common import DONE, PROBLEMS, file_argument, wait_option

_MOST_NAMED: Final = 100
_STEP: Final = 1_000  # lines between two looks at the progress


class _StopError(Exception):
    """Nothing more is loaded: why, in a sentence without its beginning."""


class _Format(NamedTuple):
    """One that the input can have: what is counted, and what makes a record of how many lines."""

    unit: str
    lines: int
    ignored: re.Pattern[bytes]
    record: Callable[[Sequence[bytes], int], Record]


_FORMATS: Final = {
    "json": _Format("lines", 1, re.compile(rb"\s*"), lambda group, now: from_line(group[0], now)),
    "redis-cli": _Format("keys", redis_cli.LINES, redis_cli.IGNORED, from_replies),
}


@click.command(
    "load",
    epilog="Example: kvstore-inspect load copy.kvs data.jsonl --on-exists skip\n\n\b\n"
    f"Example: {redis_cli.PIPELINE}",
    help="Read what dump wrote, from INPUT or standard input, into FILE, which is created if it is "
    "missing. Times are kept as they are, but that a record which replaces a younger one is given "
    "the time of that. Loading stops at a line that is malformed, and where the store is full; "
    "what came before it stays. The exit status is 1 where anything was not loaded.",
)
@file_argument
@click.argument("source", metavar="[INPUT]", type=click.File("rb"), default="-")
@click.option(
    "--on-exists",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    help="What to do with a key that the store holds already: stop there, leave the one in the "
    "store, or replace it.  [default: error]",
)
@click.option(
    "--format",
    "form",
    type=click.Choice([*_FORMATS]),
    default="json",
    help="redis-cli: what redis-cli prints of a Redis (7.0 or newer) or Valkey server in the "
    "pipeline below. A key that a store cannot hold is named and left out.  [default: json]",
)
@click.option(
    "--max-bytes",
    type=click.IntRange(MIN_MAX_BYTES, MAX_FILE_SIZE),
    default=MAX_FILE_SIZE,
    metavar="BYTES",
    help="What the file may grow to.  [default: 1,000,000,000]",
)
@wait_option
def command(
    file: Path, source: IO[bytes], on_exists: str, form: str, max_bytes: int, wait: float
) -> int:
    """Load the lines; exit 1 where any was not loaded."""
    lines = _lines(source)
    first = list(islice(lines, 1))  # before the store is opened: what cannot be read makes no file
    with KVStore(file, max_bytes=max_bytes, timeout=wait) as store:
        loading = _Loading(store, on_exists, _FORMATS[form])
        with _progress(source) as show:
            stopped = loading.run(chain(first, lines), show)
    loading.report(file)
    if stopped:
        say(f"{file}: {stopped}")
    return PROBLEMS if stopped or loading.counts["loaded"] < loading.counts["given"] else DONE


class _Loading:
    """A load under way: what became of the records so far."""

    def __init__(self, store: KVStore, on_exists: str, form: _Format) -> None:
        self._store = store
        self._on_exists = on_exists
        self._format = form
        self._now_ms = now_ms()
        self.counts: Counter[str] = Counter()

    def run(self, lines: Iterable[bytes], show: Callable[[], object]) -> str:
        """Load all lines; return why it stopped before their end, or nothing."""
        ignored = self._format.ignored.fullmatch
        numbered = ((number, line) for number, line in enumerate(lines, 1) if not ignored(line))
        while group := [*islice(numbered, self._format.lines)]:
            number = group[0][0]
            self.counts["given"] += 1
            if self.counts["given"] % _STEP == 0:
                show()
            try:
                self._load(self._format.record([line for _, line in group], self._now_ms))
            except UnfitError as error:
                self._name("left out", str(error))
            except (_StopError, MalformedLineError) as error:
                return f"stopped at line {number:,}, which is the first not loaded: {error}"
        return ""

    def _load(self, record: Record) -> None:
        if record.has_expired(self._now_ms):
            self._name("expired", f"key {escaped(record.key)}: has expired")
            return
        try:
            self._store_record(record)
        except KeyExistsError as error:
            if self._on_exists == "error":
                raise _StopError(str(error)) from None
            if self._on_exists == "skip":
                self._name("exist already", f"key {escaped(record.key)}: exists already")
                return
            self._store_record(record, replace=True)
            self.counts["replaced"] += 1
        self.counts["loaded"] += 1

    def _store_record(self, record: Record, *, replace: bool = False) -> None:
        """Create the record's key, or replace what is there, which stays where there is no room."""
        try:
            self._store._restore(*record[:4], replace=replace)
        except StoreFullError:
            self._store.purge_expired()
            try:
                self._store._restore(*record[:4], replace=replace)
            except StoreFullError as error:
                raise _StopError(str(error)) from error

    def _name(self, what: str, message: str) -> None:
        self.counts[what] += 1
        if self.counts[what] <= _MOST_NAMED:
            say(f"{message}, not loaded")

    def report(self, file: Path) -> None:
        """Say what was loaded and what was not."""
        counts = self.counts
        parts = [f"{counts['loaded']:,} of {counts['given']:,} {self._format.unit} loaded"]
        parts += [
            f"{counts[what]:,} {what}"
            for what in ("replaced", "exist already", "expired", "left out")
            if counts[what]
        ]
        say(f"{file}: {', '.join(parts)}")


def _lines(source: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines, of one that is too long the beginning."""
    try:
        while line := source.readline(LONGEST_LINE + 1):
            yield line
            while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                line = source.readline(LONGEST_LINE + 1)
    except OSError as error:
        raise OSError(error.errno, f"cannot be read: {error.strerror}", _name_of(source)) from error


def _name_of(source: IO[bytes]) -> str:
    name = source.name  # a number, where it was not opened by its name
    return name if isinstance(name, str) and name != "<stdin>" else "standard input"


@contextmanager
def _progress(source: IO[bytes]) -> Iterator[Callable[[], object]]:
    """Give a function that shows how much of the input is read, where its length is known."""
    status = os.fstat(source.fileno())
    if not stat.S_ISREG(status.st_mode):
        yield lambda: None
        return
    with progress("loading") as show:
        yield lambda: show(source.tell(), status.st_size)
