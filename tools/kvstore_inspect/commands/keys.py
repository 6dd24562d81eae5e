"""`keys`: the keys of a store, with size, TTL left and time of creation."""

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from fnmatch import translate
from itertools import islice
from pathlib import Path
from re import compile as compile_pattern
from tempfile import TemporaryFile
from typing import IO, Final, NamedTuple

import click
import orjson

from kvstore.clock import now_ms
from kvstore.format.layout import NEVER, TIME_LIMIT
from kvstore_inspect.records import Record, no_progress
from kvstore_inspect.terminal import duration, escaped, moment, progress, say

from .common import DONE, PROBLEMS, DamageReport, json_option, opened, reading, whole_records

_RUN_LENGTH: Final = 30_000
_LINES_AT_ONCE: Final = 256
_HELP = """List the keys with the size of their values, the time they have left, and their creation.

The order is the file's own, and the first lines come at once, unless --sort asks for another order.
Keys that have expired are not listed, only counted. What is damaged is named on standard error, and
the exit status is 1.

With --sort and without --top, a large store is sorted in a temporary file.

\b
--json prints JSON lines, one object for each key:
  key         text
  value_size  bytes of JSON
  created_at  ms since 1970 UTC
  expires_at  likewise; null where the key has no TTL
"""


class Listed(NamedTuple):
    """What is listed of a key; times as in the file."""

    key: str
    value_size: int
    created_at: int
    expires_at: int


_Order = Callable[[Listed], int]
# The least comes first: the largest, the one that expires next, the newest.
_ORDERS: Final[dict[str, _Order]] = {
    "size": lambda listed: -listed.value_size,
    "ttl": lambda listed: TIME_LIMIT if listed.expires_at == NEVER else listed.expires_at,
    "created": lambda listed: -listed.created_at,
}


@click.command(
    "keys",
    help=_HELP,
    epilog="Example: kvstore-inspect keys data.kvs --prefix user: --sort size --top 10",
)
@reading
@click.option("--prefix", default="", metavar="TEXT", help="Only keys that begin so.")
@click.option(
    "--match", "glob", metavar="GLOB", help="Only keys that match: * any text, ? one character."
)
@click.option(
    "--sort",
    "order",
    type=click.Choice(list(_ORDERS)),
    help="Largest value, least time left, or newest first.",
)
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the first N.")
@json_option
def command(
    file: Path,
    wait: float,
    unlocked: bool,
    prefix: str,
    glob: str | None,
    order: str | None,
    top: int | None,
    as_json: bool,
) -> int:
    """Print the keys; exit 1 where something is damaged."""
    # A bar between the lines of a listing would garble it.
    streams = order is None and sys.stdout.isatty()
    report, expired = DamageReport(file), Counter[bool]()
    with ExitStack() as files, opened(file, wait, unlocked) as view:
        with nullcontext(no_progress) if streams else progress("listing") as show:
            records = whole_records(view, now_ms(), show, report, expired=True)
            listed: Iterable[Listed] = _listed(records, _wanted(prefix, glob), expired)
            if order is None:
                _write(listed, top, as_json)
            else:
                listed = _sorted(listed, _ORDERS[order], top, files)
        if order is not None:
            _write(listed, top, as_json)
    if expired[True]:
        say(f"{expired[True]:,} expired, not listed: their space is taken back when it is needed")
    return PROBLEMS if report.count else DONE


def _wanted(prefix: str, glob: str | None) -> Callable[[str], bool]:
    """Return whether to list a key."""
    if glob is None:
        return lambda key: key.startswith(prefix)
    matches = compile_pattern(translate(glob)).match
    return lambda key: key.startswith(prefix) and matches(key) is not None


def _listed(
    records: Iterable[Record], wanted: Callable[[str], bool], expired: Counter[bool]
) -> Iterator[Listed]:
    """Yield what is wanted and has not expired; count by whether it has."""
    now = now_ms()
    for record in records:
        if wanted(record.key):
            expired[record.has_expired(now)] += 1
            if not record.has_expired(now):
                size = len(record.value)
                yield Listed(record.key, size, record.created_at, record.expires_at)


# --- in order ------------------------------------------------------------------------------------


def _sorted(
    listed: Iterable[Listed], order: _Order, top: int | None, files: ExitStack
) -> Iterable[Listed]:
    """Return the keys in that order, by key where it leaves that open.

    In memory are no more than `top` of them, or a run; each run is in a temporary file of its own.
    """
    if top is not None and top <= _RUN_LENGTH:
        return heapq.nsmallest(top, listed, key=lambda each: (order(each), each.key))
    runs: list[IO[bytes]] = []
    remaining = iter(listed)
    while run := sorted((order(each), *each) for each in islice(remaining, _RUN_LENGTH)):
        if len(run) < _RUN_LENGTH and not runs:
            return (Listed(*each[1:]) for each in run)
        file = files.enter_context(TemporaryFile())  # noqa: SIM115 - `files` closes it
        file.writelines(orjson.dumps(each, option=orjson.OPT_APPEND_NEWLINE) for each in run)
        file.seek(0)
        runs.append(file)
    merged = heapq.merge(*(map(orjson.loads, run) for run in runs))
    return (Listed(*each[1:]) for each in merged)


# --- as lines ------------------------------------------------------------------------------------


def _write(listed: Iterable[Listed], top: int | None, as_json: bool) -> None:
    """Write the first `top` keys, a line each: several at a time, but the first at once."""
    first = islice(listed, top)
    lines = _json_lines(first) if as_json else _lines(first)
    write, flush = sys.stdout.buffer.write, sys.stdout.buffer.flush
    several = 1
    while chunk := b"".join(islice(lines, several)):
        write(chunk)
        flush()
        several = min(2 * several, _LINES_AT_ONCE)


def _json_lines(listed: Iterable[Listed]) -> Iterator[bytes]:
    for key, value_size, created_at, expires_at in listed:
        yield orjson.dumps(
            {
                "key": key,
                "value_size": value_size,
                "created_at": created_at,
                "expires_at": expires_at or None,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


def _lines(listed: Iterable[Listed]) -> Iterator[bytes]:
    yield b"  size  left            created                  key\n"
    now = now_ms()
    encoding = sys.stdout.encoding
    second, created = -1, ""
    for key, value_size, created_at, expires_at in listed:
        if created_at // 1000 != second:
            second, created = created_at // 1000, moment(created_at)
        left = "no TTL" if expires_at == NEVER else duration(expires_at - now)
        line = f"{value_size:6,}  {left:14}  {created:23}  {escaped(key)}\n"
        yield line.encode(encoding, "backslashreplace")
