"""What several commands share: exit statuses, options, and the reading of a file's records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from kvstore_inspect.file_view import FileView, open_view
from kvstore_inspect.records import DamagedRecord, Progress, Record, Records
from kvstore_inspect.terminal import escaped, say

DONE: Final = 0
PROBLEMS: Final = 1
WRONG_USAGE: Final = 2
LOCKED: Final = 3

Function = TypeVar("Function", bound=Callable[..., Any])

file_argument = click.argument("file", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
wait_option = click.option(
    "--wait",
    type=click.FloatRange(0, 10**6),
    default=0.0,
    metavar="SECONDS",
    help="How long to wait for another process to let go of the file.  [default: 0]",
)
unlocked_option = click.option(
    "--unlocked",
    is_flag=True,
    help="Look at a file that is in use, without its lock. What changes meanwhile may be missing.",
)


def reading(function: Function) -> Function:
    """Give a command the argument FILE and the options of all that only read it."""
    for decorate in (unlocked_option, wait_option, file_argument):
        function = decorate(function)
    return function


@contextmanager
def opened(file: Path, wait: float, unlocked: bool) -> Iterator[FileView]:
    """Open the file to look at it; say so where it is looked at without its lock."""
    with open_view(file, wait=wait, unlocked=unlocked) as view:
        if unlocked:
            say(f"{file}: looked at without its lock; what changes meanwhile may be missing")
        yield view


class DamageReport:
    """Says on standard error what of a file is damaged, and of which key; counts it.

    Where no file is given, it only counts.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.count = 0

    def add(self, damage: DamagedRecord) -> None:
        """Name something that is damaged."""
        self.count += 1
        if self._file is None:
            return
        whose = "" if damage.key is None else f" key {escaped(damage.key)}:"
        say(f"{self._file}:{whose} {damage.message} (byte {damage.offset:,})")


def whole_records(
    view: FileView, now_ms: int, show: Progress, report: DamageReport, *, expired: bool = False
) -> Iterator[Record]:
    """Yield the records that are whole, by default those that have not expired; report others."""
    for found in Records(view, show):
        if isinstance(found, DamagedRecord):
            report.add(found)
        elif expired or not found.has_expired(now_ms):
            yield found
