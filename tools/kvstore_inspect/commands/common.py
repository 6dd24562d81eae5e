"""What several commands share: their options, and opening the file that they look at."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from kvstore_inspect.file_view import FileView, open_view
from kvstore_inspect.records import DamagedRecord
from kvstore_inspect.terminal import escaped, say

DONE, PROBLEMS = 0, 1

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


def now_ms() -> int:
    """Return the time as the file has it."""
    return max(0, time.time_ns() // 1_000_000)


def name_damage(file: Path, damage: DamagedRecord) -> None:
    """Say on standard error what is damaged, and of which key."""
    whose = "" if damage.key is None else f" key {escaped(damage.key)}:"
    say(f"{file}:{whose} {damage.message} (byte {damage.offset:,})")
