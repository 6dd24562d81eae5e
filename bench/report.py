"""The pages and charts that tell what bench/run.py measured, made from bench/results alone.

    python bench/report.py

Writes all tables and five charts beside the results; and into bench/README.md and the project's
README what stands between two markers, where they have them. Run again on the same results it
changes nothing.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from charts import draw_all
from engines.own import COMPILED, PLAIN
from operations import OPERATIONS, typical_case
from records import SHAPES, TEXT, WORDS
from run import EXPERIMENTS
from targets import PEERS, Target, judge, targets_table

from harness import (
    RESULT_FORMAT,
    Column,
    engine_table,
    machine_line,
    markdown_table,
    show_mebibytes,
)

BEGIN: Final = "<!-- figures: begin, made by bench/report.py -->"
END: Final = "<!-- figures: end -->"
# Places in the project, which are also links in its README.
RESULTS: Final = "bench/results"
PAGE: Final = "bench/README.md"
TABLES: Final = "tables.md"
SIZES: Final = (100, 1000, 16_000)  # of values, in bytes
PARSING: Final = ("create", "put", "read")  # what takes more where values are harder to parse

Results = Mapping[str, dict[str, Any]]


def read_results(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return the results of experiments, and of those without any, why."""
    results: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for name in EXPERIMENTS:
        try:
            result = json.loads((folder / f"{name}.json").read_text())
        except FileNotFoundError:
            missing[name] = "not measured"
            continue
        if result.get("format") != RESULT_FORMAT:
            missing[name] = f"of format {result.get('format')}, {RESULT_FORMAT} is expected"
        elif result["scale"] != "full":
            missing[name] = f"from a {result['scale']} run, whose figures mean nothing"
        else:
            results[name] = result
    return results, missing


def make_page(results: Results, missing: Mapping[str, str], charts: Mapping[str, str]) -> str:
    """Return the figures of the page, which is to be beside the folder of the results."""
    parts = []
    if results:
        parts += [f"{machine_line(_first_machine(results))}.", make_summary(results)]
    parts += [f"![{shows}](results/{name})" for name, shows in charts.items()]
    if failures := results.get("failures"):
        parts += ["## Failures", import_module("failures").format_result(failures)]
    if targets := judge(results):
        parts += ["## Targets", _missed(targets)]
    if missing:
        reasons = "; ".join(f"{name}, {why}" for name, why in missing.items())
        parts.append(f"Left out: {reasons}.")
    return "\n\n".join(parts)


def make_summary(results: Results) -> str:
    """Return a table with a line for each engine, of figures of all experiments."""
    small, large = _typical(results, 100), _typical(results, 16_000, TEXT)
    latency = results.get("latency", {}).get("engines", {})
    durable = {row["engine"]: row for row in results.get("durable", {}).get("rows", ())[::-1]}
    stores = results.get("footprint", {}).get("engines", {})
    rows = {
        name: {
            "small": {operation: each[name] for operation, each in small.items() if name in each},
            "large": {operation: each[name] for operation, each in large.items() if name in each},
            "latency": latency.get(name, {}),
            "durable": durable.get(name, {}),
            "store": stores.get(name, {}),
        }
        for name in _first_machine(results)["engines"]
    }
    columns: list[Column] = [
        *((f"{name}, µs", "{:.2f}".format, ("small", name, "median")) for name in OPERATIONS),
        ("create 16,000 B, one string, µs", "{:.1f}".format, ("large", "create", "median")),
        *(
            (
                f"{share} of {name}, µs",
                "{:,.0f}".format,
                ("latency", "microseconds", name, share, "median"),
            )
            for share, name in (("p99.9", "create"), ("p99.99", "create"), ("p99.9", "put"))
        ),
        ("durable creates a second", "{:,.0f}".format, ("durable", "per_second", "1", "median")),
        ("bytes to the disk for each", "{:,.0f}".format, ("durable", "written_bytes")),
        ("bytes a record", "{:,.0f}".format, ("store", "bytes_per_record", "100")),
        ("memory, MiB", show_mebibytes, ("store", "late_bytes")),
        ("opening after SIGKILL, ms", "{:,.1f}".format, ("store", "killed", "median")),
    ]
    return engine_table("100 B, where no size is said", rows, columns)


def _typical(results: Results, size: int, shape: str = WORDS) -> Mapping[str, Any]:
    """Return the figures of values like this in a store that is neither small nor large."""
    return typical_case(results.get("operations", {"cases": []}), size, shape)


def _missed(targets: Sequence[Target]) -> str:
    missed = [target for target in targets if not target.met]
    met = len(targets) - len(missed)
    text = f"{met} of {len(targets)} [targets](results/{TABLES}#targets) are met"
    return f"{text}; missed are:\n\n{targets_table(missed)}" if missed else f"{text}."


def _first_machine(results: Results) -> Mapping[str, Any]:
    machine: Mapping[str, Any] = next(iter(results.values()))["machine"]
    return machine


def make_tables(results: Results) -> str:
    """Return the page of all tables."""
    parts = ["# All tables", "What they are and what they do not say: [the page](../README.md)."]
    for name, result in results.items():
        module = import_module(name)
        parts += [
            f"## {name.capitalize()}",
            (module.__doc__ or "").strip(),
            module.format_result(result),
            _how_measured(name, result, _first_machine(results)),
        ]
    if targets := judge(results):
        text = "Speeds are ratios of medians, the worst of both shapes of value and of all stores."
        parts += ["## Targets", text, targets_table(targets)]
    return "\n\n".join(parts) + "\n"


def _how_measured(name: str, result: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    machine = result["machine"]
    about = f"`python bench/run.py --only {name}`, {result['seconds'] / 60:.1f} minutes"
    if {**machine, "date": ""} == {**usual, "date": ""}:
        return f"{about}, {machine['date']}."
    return f"{about}, not as the others: {machine_line(machine)}."


def make_short(results: Results) -> str:
    """Return the part of the project's README: a row of figures for each operation."""
    parts = []
    if rows := list(_short_rows(results)):
        machine = _first_machine(results)
        text = (
            "Microseconds that kvstore's compiled implementation takes, and how many times as long "
            "the fastest of the other stores on disk takes, SQLite, and kvstore's plain "
            f"implementation ({machine['cpu']}, {machine['cpu_count']} CPUs, "
            f"{machine['file_system']}, {machine['python']}):"
        )
        parts += [text, markdown_table(["values of", *(f"{size:,} B" for size in SIZES)], rows)]
    parts.append(f"Method, charts, targets and what misses them, caveats: [{PAGE}]({PAGE}).")
    return "\n\n".join(parts)


def _short_rows(results: Results) -> Iterable[list[str]]:
    for operation in OPERATIONS:
        for shape in SHAPES if operation in PARSING else (WORDS,):
            figures = [_typical(results, size, shape).get(operation, {}) for size in SIZES]
            if any(cells := [_short_cell(each) for each in figures]):
                yield [f"{operation}, {shape}" if operation in PARSING else operation, *cells]


def _short_cell(figures: Mapping[str, Any]) -> str:
    medians = {name: each["median"] for name, each in figures.items()}
    if COMPILED not in medians:
        return ""
    own = medians[COMPILED]
    peers = {medians[peer]: peer for peer in PEERS if peer in medians}
    told = [f"{min(peers) / own:.1f}× {peers[min(peers)]}"] if peers else []
    for other, name in (("sqlite3", "SQLite"), (PLAIN, "plain")):
        if other in medians:
            told.append(f"{medians[other] / own:.1f}× {name}")
    return f"**{own:.1f}**; {', '.join(told)}"


def put_between_markers(path: Path, part: str) -> None:
    """Put `part` between the two markers of a file, if it has them."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        path.write_text(f"{before}{BEGIN}\n\n{part}\n\n{END}{after}")


def make_report(root: Path) -> dict[str, str]:
    """Write charts and pages of the project in a folder; return what was left out, and why."""
    folder = root / RESULTS
    results, missing = read_results(folder)
    charts = draw_all(results, folder)
    (folder / TABLES).write_text(make_tables(results))
    put_between_markers(root / PAGE, make_page(results, missing, charts))
    put_between_markers(root / "README.md", make_short(results))
    return missing


def main() -> None:
    """Write charts and pages."""
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parent.parent,
        help="folder of the project (default: the one that this file is in)",
    )
    for name, why in make_report(parser.parse_args().root).items():
        print(f"left out: {name}, {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
