"""`verify`: every structure and checksum of a file against every other."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
import orjson
from rich.text import Text

from kvstore import CorruptStoreError
from kvstore.clock import now_ms
from kvstore.recovery.problems import Breach, Problem
from kvstore_inspect.check_result import CheckResult, Counts, key_of
from kvstore_inspect.explanations import Remedy, meaning, remedies
from kvstore_inspect.file_view import FileView
from kvstore_inspect.opening import Opening
from kvstore_inspect.terminal import counted, escaped, out, path_text, progress, say, show_line

from .common import DONE, PROBLEMS, json_option, opened, reading

MOST_SHOWN: Final = 10  # of a kind
_LEFT_BY_CRASHES: Final = frozenset({Breach.NOT_CLOSED, Breach.GROWTH_LOST})


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
    expiring, orphaned, expired, outdated (older records of a key that has a newer one), marked (as
    deleted, and kept to outrank older ones), damaged.
    """,
)
@reading
@json_option
@click.option("--all", "show_all", is_flag=True, help="Tell of all problems, not of 10 of a kind.")
def command(file: Path, wait: float, unlocked: bool, as_json: bool, show_all: bool) -> int:
    """Print what is wrong; exit 1 where anything is."""
    try:
        with opened(file, wait, unlocked) as view:
            result = CheckResult(view, now_ms())
            if as_json:
                _print_json(result, _chosen(result, show_all))
            else:
                _print(result, _chosen(result, show_all), show_all)
    except CorruptStoreError as error:
        say(f"kvstore-inspect: {error}")
        say(f"  mend: {Remedy.RESTORE.advice(path_text(file)).partition(';')[0]}")
        return PROBLEMS
    return PROBLEMS if result.breaches else DONE


def _chosen(result: CheckResult, show_all: bool) -> Iterator[Problem]:
    """Go through all problems, and yield those that are to be shown one by one."""
    with progress("checking") as show:
        for problem in result.problems(show):
            if show_all or result.breaches[problem.breach] <= MOST_SHOWN:
                yield problem


def _count(result: CheckResult) -> Counts:
    """Count the records, after the problems."""
    with progress("counting") as show:
        return result.count(show)


# --- for programs ------------------------------------------------------------------------------


def _print_json(result: CheckResult, problems: Iterator[Problem]) -> None:
    # One by one: there may be millions of problems.
    write = sys.stdout.buffer.write
    write(b'{"problems": [')
    separator = b"\n  "
    for problem in problems:
        write(separator + orjson.dumps(_as_object(result.view, problem)))
        separator = b",\n  "
    write(b"],\n" + orjson.dumps(_summary(result))[1:] + b"\n")


def _as_object(view: FileView, problem: Problem) -> dict[str, Any]:
    return {
        "breach": problem.breach,
        "offset": problem.offset,
        "structure": problem.structure,
        "message": problem.message,
        "key": key_of(view, problem),
    }


def _summary(result: CheckResult) -> dict[str, Any]:
    view, breaches = result.view, result.breaches
    name, opening = path_text(view.path), view.next_opening()
    advised = remedies(set(breaches), opening)
    return {
        "file": name,
        "fine": not breaches,
        "closed": view.state.clean,
        "index_trusted": view.trusted,
        "in_use": view.in_use and view.holder_lives(),
        "kinds": [
            {
                "breach": breach,
                "count": breaches[breach],
                "meaning": meaning(breach, opening),
                "remedy": advised[breach],
                "advice": advised[breach].advice(name),
            }
            for breach in Breach
            if breaches[breach]
        ],
        "counts": asdict(_count(result)),
    }


# --- for people --------------------------------------------------------------------------------


def _print(result: CheckResult, problems: Iterator[Problem], show_all: bool) -> None:
    of_kind: dict[Breach, list[str]] = {}
    for problem in problems:
        line = _line(result.view, problem)
        if show_all:  # maybe millions: not for the console, which takes its time
            sys.stdout.write(f"{line}\n")
        else:
            of_kind.setdefault(problem.breach, []).append(line)
    counts = _count(result)
    advised = remedies(set(result.breaches), result.view.next_opening())
    for breach in Breach:
        if result.breaches[breach]:
            _print_kind(result, breach, of_kind.get(breach, []), advised[breach])
    _print_counts(counts)
    _print_outcome(result)


def _line(view: FileView, problem: Problem) -> str:
    key = key_of(view, problem)
    of_key = f" (key {escaped(key)})" if key else ""
    return f"{problem}{of_key}"


def _print_kind(result: CheckResult, breach: Breach, lines: list[str], remedy: Remedy) -> None:
    count = result.breaches[breach]
    out.print(Text.assemble((breach, "bold red"), f"  {count:,}" if count > 1 else ""))
    for line in lines:
        show_line(f"  {line}")
    if lines and count > len(lines):
        show_line(f"  and {count - len(lines):,} more of the kind; --all shows them")
    show_line(f"  means: {meaning(breach, result.view.next_opening())}")
    show_line(f"  mend: {remedy.advice(escaped(path_text(result.view.path)))}")
    show_line()


def _print_counts(counts: Counts) -> None:
    columns = [(name, f"{number:,}") for name, number in asdict(counts).items()]
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        show_line("   ".join(cells))


def _print_outcome(result: CheckResult) -> None:
    if result.gone > 0:
        show_line(
            f"{result.gone:,} findings of the first look were changes under way: gone, or "
            f"changed, when looked at again"
        )
    name = escaped(path_text(result.view.path))
    opening = result.view.next_opening()
    if not result.breaches:
        show_line(f"{name}: no problems")
    elif opening is Opening.REBUILDS and set(result.breaches) <= _LEFT_BY_CRASHES:
        show_line(
            f"{name}: was not closed, and nothing else is wrong: the next opening rebuilds the "
            f"index, and nothing is lost"
        )
    else:
        refused = opening is Opening.REFUSES
        more = ", and the store does not open before that is mended" if refused else ""
        show_line(f"{name}: {counted(result.breaches.total(), 'problem')}{more}")
