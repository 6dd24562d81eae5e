"""What all experiments share: the plan, spreads of figures, tables, the record of the machine."""

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, Final, TypeVar

from engines import Kind

RESULTS: Final = Path(__file__).resolve().parent / "results"
RESULT_FORMAT: Final = 4  # of the files there: add one where figures come under another name

Choice = TypeVar("Choice")
Figures = Mapping[str, float]
# Of a table: its heading, how a figure is shown, and the keys that lead to it in a row.
Column = tuple[str, Callable[[Any], str], tuple[str, ...]]


class Progress:
    """One line on standard error that says how far it is; a line a minute, if no terminal."""

    heading = ""
    """What each of them begins with."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._began = self._told = monotonic()

    def show(self, text: str) -> None:
        """Put `text` in the place of what was there; an empty one clears the line."""
        now = monotonic()
        if text:
            minutes, seconds = divmod(int(now - self._began), 60)
            text = f"{minutes}:{seconds:02} {self.heading}{text}"[:100]
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif text and now >= self._told + 60:
            self._told = now
            print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """What an experiment is asked for."""

    place: Path
    """A folder of its own, on the disk to be measured."""
    engines: Mapping[str, Kind]
    """By the name that their figures have; each can be imported."""
    scale: str = "full"
    """`full`, `quick`, or `tiny` for a test of all this."""
    rounds: int | None = None
    """How often everything is to be measured, if not as often as the experiment has it."""
    progress: Progress = field(default_factory=Progress)
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Engines that cannot be imported, and why."""

    def pick(self, full: Choice, quick: Choice, tiny: Choice | None = None) -> Choice:
        """Return what is meant for the scale; where it has no tiny form, the quick one."""
        if self.scale == "full":
            return full
        return tiny if self.scale == "tiny" and tiny is not None else quick

    def with_file(self) -> dict[str, Kind]:
        """Return the engines that keep a file."""
        return {name: kind for name, kind in self.engines.items() if kind.keeps_a_file}


class Skipped(Exception):
    """An experiment cannot be done here; the message says why."""


def spread(figures: Sequence[float]) -> dict[str, float]:
    """Return the median of some rounds' figures, their extremes, and how many there are."""
    return {
        "median": median(figures),
        "min": min(figures),
        "max": max(figures),
        "rounds": len(figures),
    }


def show_spread(figures: Figures, digits: int = 2) -> str:
    """Return what `spread` returned, as text."""
    middle, least, most = (f"{figures[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({least}–{most})" if figures["rounds"] > 1 else middle


def show_mebibytes(size: float) -> str:
    """Return a number of bytes as text."""
    return f"{size / (1 << 20):.2f}"


def ratio(figures: Figures, base: Figures) -> float:
    """Return the ratio of two medians."""
    return figures["median"] / base["median"]


def to_json(result: Mapping[str, Any]) -> str:
    """Return a result as JSON to be kept: short numbers, and what is flat on one line."""
    text = json.dumps(_shorten(result), indent=1, ensure_ascii=False) + "\n"
    return re.sub(r"[\[{]\n[^\[\]{}]+?\n\s*[\]}]", lambda found: " ".join(found[0].split()), text)


def _shorten(value: Any) -> Any:
    """Return the value with four digits of each float: no figure here is good for more."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): _shorten(each) for key, each in value.items()}
    return [_shorten(each) for each in value] if isinstance(value, list | tuple) else value


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns line up as plain text too; all but the first to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )


def engine_table(heading: str, rows: Mapping[str, Any], columns: Iterable[Column]) -> str:
    """Return a table with a row for each engine; a figure that is not there is a dash."""
    columns = list(columns)
    cells = [[name, *(_show_cell(row, column) for column in columns)] for name, row in rows.items()]
    return markdown_table([heading, *(name for name, _, _ in columns)], cells)


def _show_cell(row: Any, column: Column) -> str:
    _, show, keys = column
    for key in keys:
        if key not in row:
            return "–"
        row = row[key]
    return show(row)


def with_failures(tables: Iterable[str], failures: Mapping[str, str]) -> str:
    """Return tables, and below them who failed and why."""
    lines = "\n".join(f"- {who} failed: {why}" for who, why in failures.items())
    return "\n\n".join([*tables, lines] if lines else tables)


def describe_machine(plan: Plan) -> dict[str, Any]:
    """Return what figures depend on: machine, Python, versions, file system; and who is missing."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "file_system": file_system(plan.place),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "orjson": metadata.version("orjson"),
        "engines": {name: kind.version() for name, kind in plan.engines.items()},
        "left_out": plan.left_out,
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the record of `describe_machine` as a line of text."""
    versions = ", ".join(dict.fromkeys(machine["engines"].values()))
    missing = ", ".join(f"{name} ({why})" for name, why in machine["left_out"].items())
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['cpu_count']} CPUs, {machine['system']}, "
        f"{machine['file_system']}; {machine['python']}, orjson {machine['orjson']}, {versions}"
        f"{missing and f'; left out: {missing}'}"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def file_system(directory: Path) -> str:
    """Return the type of the file system that `directory` is on, where Linux tells it."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    resolved = directory.resolve()
    found = (0, "unknown")
    for mount in mounts:
        _, place, kind, *_ = mount.split()
        if resolved.is_relative_to(place):
            found = max(found, (len(place), kind))
    return found[1]
