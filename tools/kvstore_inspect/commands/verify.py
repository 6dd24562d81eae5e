"""`verify`: every structure and checksum of a file against every other."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
import orjson
from rich.text import Text

from kvstore import CorruptStoreError
from kvstore.clock import now_ms
from kvstore.recovery.problems import Breach, Problem
from kvstore_inspect.check_result import (
    CheckResult,
    Counts,
    holder_lives,
    key_of,
    lasting_problems,
    opening_of,
    shown,
)
from kvstore_inspect.explanations import Remedy, meaning, remedies
from kvstore_inspect.file_view import FileView
from kvstore_inspect.opening import Opening
from kvstore_inspect.terminal import counted, escaped, out, progress, say

from .common import DONE, PROBLEMS, json_option, opened, reading

MOST_SHOWN: Final = 10  # of a kind


@click.command(
    "verify",
    epilog="Example: kvstore-inspect verify data.kvs",
    help="""Check every structure and checksum of FILE against every other.

    Tells of each problem where it is, what it means for the data, and what mends it; then how many
    keys there are, how many expire, have expired, are led to by no slot, are damaged. A file that
    was not closed counts as a problem, though the next opening mends it. With --unlocked, what does
    not fit is looked at again before it is called damaged.

    The fields of --json: file; fine; closed, whether it was closed in order; index_trusted; in_use;
    problems, each with breach, offset, structure, message, key (null where unknown); kinds, each
    with breach, count, meaning, remedy (open, repair, delete, restore), advice; counts, with keys,
    expiring, orphaned, expired, outdated, damaged.
    """,
)
@reading
@json_option
@click.option("--all", "show_all", is_flag=True, help="Tell of all problems, not of 10 of a kind.")
def command(file: Path, wait: float, unlocked: bool, as_json: bool, show_all: bool) -> int:
    """Print what is wrong; exit 1 where anything is."""
    try:
        with opened(file, wait, unlocked) as view:
            checking = _Checking(file, view, show_all)
            problems = checking.lasting() if unlocked else checking.at_rest()
            (_print_json if as_json else _print)(checking, problems)
    except CorruptStoreError as error:
        say(f"kvstore-inspect: {error}")
        say(f"  mend: {Remedy.RESTORE.advice(shown(file)).partition(';')[0]}")
        return PROBLEMS
    return PROBLEMS if checking.result.breaches else DONE


class _Checking:
    """What is checked, and what was found so far."""

    def __init__(self, file: Path, view: FileView, show_all: bool) -> None:
        self.name = shown(file)
        self.view = view
        self.result = CheckResult(view, now_ms())
        self.gone = 0
        self.show_all = show_all

    def at_rest(self) -> Iterator[Problem]:
        """Yield the problems of a file that nobody else changes."""
        with progress("checking") as show:
            self.result.show(show)
            yield from self.result.problems()

    def lasting(self) -> Iterator[Problem]:
        """Yield those of a file in use that stay."""
        with progress("checking") as show:
            found, self.gone = lasting_problems(self.view, show)
        for problem in found:
            self.result.note(problem)
            yield problem

    def chosen(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        """Go through all problems, and yield those that are to be told of one by one."""
        for problem in problems:
            if self.show_all or self.result.breaches[problem.breach] <= MOST_SHOWN:
                yield problem

    def count(self) -> Counts:
        """Count the records, after the problems."""
        with progress("counting") as show:
            self.result.show(show)
            return self.result.count()


# --- for programs ------------------------------------------------------------------------------


def _print_json(checking: _Checking, problems: Iterable[Problem]) -> None:
    # One by one: there may be millions of problems.
    write = sys.stdout.buffer.write
    write(b'{"problems": [')
    separator = b"\n  "
    for problem in checking.chosen(problems):
        write(separator + orjson.dumps(_as_object(checking.view, problem)))
        separator = b",\n  "
    write(b"],\n" + orjson.dumps(_summary(checking))[1:] + b"\n")


def _as_object(view: FileView, problem: Problem) -> dict[str, Any]:
    return {
        "breach": problem.breach,
        "offset": problem.offset,
        "structure": problem.structure,
        "message": problem.message,
        "key": key_of(view, problem),
    }


def _summary(checking: _Checking) -> dict[str, Any]:
    breaches = checking.result.breaches
    view = checking.view
    opening = opening_of(view)
    mends = remedies(set(breaches), opening)
    return {
        "file": checking.name,
        "fine": not breaches,
        "closed": view.state.clean,
        "index_trusted": view.trusted,
        "in_use": view.in_use and holder_lives(view),
        "kinds": [
            {
                "breach": breach,
                "count": breaches[breach],
                "meaning": meaning(breach, opening),
                "remedy": mends[breach],
                "advice": mends[breach].advice(checking.name),
            }
            for breach in Breach
            if breaches[breach]
        ],
        "counts": asdict(checking.count()),
    }


# --- for people --------------------------------------------------------------------------------


def _print(checking: _Checking, problems: Iterable[Problem]) -> None:
    shown_now: dict[Breach, list[Problem]] = {}
    stream = checking.chosen(problems)
    if checking.show_all:
        for problem in stream:  # maybe millions: not for the console, which takes its time
            sys.stdout.write(f"{_line(checking.view, problem)}\n")
    else:
        for problem in stream:
            shown_now.setdefault(problem.breach, []).append(problem)
    counts = checking.count()
    breaches = checking.result.breaches
    mends = remedies(set(breaches), opening_of(checking.view))
    for breach in Breach:
        if breaches[breach]:
            _print_kind(checking, breach, shown_now.get(breach, []), mends[breach])
    _print_counts(checking, counts)


def _print_kind(
    checking: _Checking, breach: Breach, problems: list[Problem], remedy: Remedy
) -> None:
    count = checking.result.breaches[breach]
    out.print(Text.assemble((breach, "bold red"), f"  {count:,}" if count > 1 else ""))
    for problem in problems:
        out.print(Text(f"  {_line(checking.view, problem)}"))
    if problems and count > len(problems):
        out.print(Text(f"  and {count - len(problems):,} more of the kind; --all shows them"))
    out.print(Text(f"  means: {meaning(breach, opening_of(checking.view))}"))
    out.print(Text(f"  mend: {remedy.advice(escaped(checking.name))}"))
    out.print()


def _line(view: FileView, problem: Problem) -> str:
    key = key_of(view, problem)
    of_key = f" (key {escaped(key)})" if key else ""
    return f"{problem}{of_key}"


def _print_counts(checking: _Checking, counts: Counts) -> None:
    columns = [(name, f"{number:,}") for name, number in asdict(counts).items()]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        out.print(Text("   ".join(cells)))
    if checking.gone > 0:
        out.print(
            Text(
                f"{checking.gone:,} findings of the first look were changes under way: gone, or "
                f"changed, when looked at again"
            )
        )
    found = sum(checking.result.breaches.values())
    name = escaped(checking.name)
    opening = opening_of(checking.view)
    if not found:
        out.print(Text(f"{name}: no problems"))
    elif opening is Opening.REBUILDS and set(checking.result.breaches) <= {
        Breach.NOT_CLOSED,
        Breach.GROWTH_LOST,
    }:
        out.print(
            Text(
                f"{name}: was not closed, and nothing else is wrong: the next opening rebuilds the "
                f"index, and nothing is lost"
            )
        )
    else:
        said = counted(found, "problem")
        if opening is Opening.REFUSES:
            said += ", and the store does not open before that is mended"
        out.print(Text(f"{name}: {said}"))
