"""What is printed, and how: tables and progress for people, JSON for programs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line on standard error, as it is."""
    errors.print(message, markup=False)


def print_json(value: Any) -> None:
    """Print a value as JSON, indented, on standard output."""
    sys.stdout.buffer.write(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )
    sys.stdout.buffer.flush()


def write_json(*pieces: bytes) -> None:
    """Write pieces of JSON on standard output, for what is too long to be held whole."""
    for piece in pieces:
        sys.stdout.buffer.write(piece)


def escaped(text: str) -> str:
    """Return `text` so that a terminal shows it and does nothing else: unprintable as escapes."""
    return "".join(
        character
        if character.isprintable() and character != "\\"
        else character.encode("unicode_escape", "backslashreplace").decode()
        for character in text
    )


def moment(milliseconds: int) -> str:
    """Return a time, given in milliseconds since 1970 UTC; as it is where no calendar has it."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{milliseconds:,} ms"


def duration(milliseconds: int) -> str:
    """Return how long that is, in its two largest units."""
    seconds = abs(milliseconds) // 1000
    units = (("y", 31_536_000), ("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, size in units:
        count, seconds = divmod(seconds, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
        if parts and len(parts) == 2:
            break
    return " ".join(parts[:2])


def size(count: int) -> str:
    """Return a number of bytes, with its unit."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], object]]:
    """Give a function for `done, whole`: a bar on standard error, where that is a terminal."""
    if not errors.is_terminal:
        yield lambda _done, _whole: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)
