"""What is printed, and how: tables and progress for people, JSON for programs."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from errno import EPIPE
from typing import IO, Any, Final

import orjson
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvstore.file.platform import system

_UNLIMITED_WIDTH: Final = 10_000  # where lines do not wrap: in a pipe, or a file


class OutputError(OSError):
    """Standard output does not take what is written."""


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if system.has_no_reader(error):
                raise BrokenPipeError(EPIPE, error.strerror) from error
            raise OutputError(error.errno, error.strerror) from error


def prepare_streams() -> None:
    """Tell failures to write on standard output from others, in whatever encoding it is.

    In the place of a stream that was closed comes one that fails when it is used. Else the store's
    file would get its number, and what somebody prints be written into the store.
    """
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
            pass
        os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.open(os.devnull, os.O_WRONLY), encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:  # in whose place some print on standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is sys.__stdout__:  # and not what a test reads
        encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(_Output(1, "w", closefd=False)),
            encoding,
            errors="backslashreplace",
            line_buffering=os.isatty(1),
        )


def give_up(stream: IO[str]) -> None:
    """Where a stream cannot be written, keep Python from trying once more at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(Console):
    """One that leaves it to the command line what a closed pipe ends in."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True)
errors = _Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a line on standard error, if it takes one, what is unprintable in it as escapes."""
    try:
        errors.print(Text("".join(map(_shown, message))))
    except OSError:  # the exit status still tells
        give_up(sys.stderr)


def show_line(text: str = "", style: str = "") -> None:
    """Print a line on standard output."""
    out.print(Text(text, style))


def show_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and what they have, a line each, on standard output."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in fields:
        table.add_row(name, Text(text))
    show_table(table)


def show_table(table: Table) -> None:
    """Print a table on standard output, as wide as it is where that is no terminal."""
    if out.is_terminal:
        out.print(table, soft_wrap=False)
        return
    console = _Console(file=sys.stdout, highlight=False, width=_UNLIMITED_WIDTH)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(f"{line.rstrip()}\n")


def print_json(value: Any) -> None:
    """Print a value as JSON, indented, on standard output."""
    sys.stdout.buffer.write(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    )
    sys.stdout.buffer.flush()


def escaped(text: str) -> str:
    """Return `text` so that a terminal shows it and does nothing else: unprintable as escapes."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join("\\\\" if character == "\\" else _shown(character) for character in text)


def path_text(path: str | os.PathLike[str]) -> str:
    """Return a path as text that any stream takes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def show_json_text(text: str) -> None:
    """Print JSON in colours, what is unprintable in it as JSON's own escapes."""
    shown = "".join(
        character if character.isprintable() or character == "\n" else _json_escape(character)
        for character in text
    )
    out.print(JSONHighlighter()(Text(shown)))


def _json_escape(character: str) -> str:
    return json.dumps(character)[1:-1]


def moment(milliseconds: int, *, exact: bool = False) -> str:
    """Return a time, given in milliseconds since 1970 UTC; as it is where no calendar has it.

    It is that to the second, or to the millisecond where it is to be `exact`.
    """
    seconds, rest = divmod(milliseconds, 1000)
    try:
        text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{milliseconds:,} ms"
    return f"{text}.{rest:03} UTC" if exact else f"{text} UTC"


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


def counted(number: int, thing: str) -> str:
    """Return a number of things whose plural ends in s."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def size(count: int) -> str:
    """Return a number of bytes, with its unit."""
    number = float(count)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def size_exactly(count: int) -> str:
    """Return a number of bytes, with its unit, and to the byte."""
    return size(count) if count < 1024 else f"{size(count)} ({count:,} B)"


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
    # Standard output is left alone: bytes are written to it, and it may be no terminal.
    bar = Progress(
        *columns, console=errors, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    with bar:
        task = bar.add_task(label, total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)
