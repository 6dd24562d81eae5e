"""The pages and charts that tell what bench/run.py measured, made from bench/results alone.

    python bench/report.py

Writes charts beside the results, bench/README.md, and the part of the project's README between its
two markers. Run again on the same results it changes nothing.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from demands import Demand, SpeedSeen, facts, judge, judge_speeds
from engines.own import COMPILED, IMPLEMENTATIONS, PLAIN
from operations import OPERATIONS
from pictures import Picture, draw
from run import EXPERIMENTS

from harness import RESULT_FORMAT, machine_line, markdown_table

BEGIN: Final = "<!-- figures: begin, made by bench/report.py -->"
END: Final = "<!-- figures: end -->"
SHOWN: Final = ("operations-100.svg", "growth.svg")  # in the project's README
# Places in the project, which are also links in its README.
RESULTS: Final = "bench/results"
PAGE: Final = "bench/README.md"

Results = Mapping[str, dict[str, Any]]

METHOD: Final = """
`python bench/run.py` measures all of this in about an hour, `--quick` tries all of it in three
minutes, `--only growth,memory` does a part anew and leaves the other results as they are, and
`python bench/report.py` makes this page and its charts from [the figures](results).
`pip install '.[bench]'` brings the other engines; Tkrzw and Kyoto Cabinet are taken from the
system's Python where it has them (`apt-get install python3-tkrzw python3-kyotocabinet`).

- **kvstore is two engines**: `kvstore` with its hot path compiled, `kvstore-plain` with it in
  Python. Each runs in processes that have no other, and nothing is measured as `kvstore` where it
  is not compiled.
- **The same work for all**: values are encoded and parsed by orjson; an expiry is stored with each
  and checked on reading; `create` fails where the key is there, `delete` where it is not; any
  thread may call. What an engine lacks, its adapter in `engines` adds, in as few lines as it takes.
- **No engine is tuned more than another**: each is used as its documentation says for speed, and
  does not wait for the disk but where that is what is measured. `sqlite3-tuned` is what more
  could be had from SQLite by settings that not every program can have.
- **Each in a process of its own**, started afresh, on the same disk; never two at a time. They take
  turns in shuffled order, so that what slows the machine for a while slows each as often.
- **Medians and extremes** of several rounds; slow engines do fewer of them. Ratios in the tables
  are medians of the rounds' ratios, but what was asked for is judged by ratios of the medians.
- **The same loop for all**: bound methods `create`, `read` and `delete`, called with the same
  arguments. kvstore has these as they are; the adapters of the others are their `create`, `read`
  and `delete`, and their calls, locks and checks count, for kvstore's count too. A miss is a
  KeyError that the loop catches, whoever raises it.
- **What fails is told**: an engine that dies, hangs or does not come to an end in its time has a
  line that says so.
- Keys are 20 hexadecimal digits in no order, values flat objects of words and numbers.
"""

DEMANDS: Final = (
    "Speeds are ratios of medians, the worst of all cases: each size of value, and each number of "
    "records (100,000 in `operations`; in `million` 1,000,000, of 1,000 B 750,000)."
)

CAVEATS: Final = """
- They are those of one machine, whose owner shares it with others: its speed changes from minute to
  minute. Ratios of figures taken in turns mean something; microseconds by themselves, and the
  extremes, mean little.
- The files are in the page cache but for `limited`: no figure says how long a disk takes to read.
- All engines are called from Python, by adapters in Python, and most of the time is Python's: JSON,
  locks, calls. Between engines written in C the gaps would be others, and wider.
- One process has the store to itself. SQLite and LMDB let several processes share one, and pay for
  it; kvstore does not.
- Some engines keep more than is asked for here (order of keys, transactions over many, queries),
  others promise less: what survives a kill or a damaged disk is in the tables, not in the times.
- Values are made of a few words, so engines that compress them save more than they might elsewhere.
"""


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
        elif result["quick"]:
            missing[name] = "from a quick run, whose figures mean nothing"
        else:
            results[name] = result
    return results, missing


def draw_all(results: Results, folder: Path) -> dict[str, list[Picture]]:
    """Draw the charts of all experiments into `folder`, and remove others from there."""
    pictures = {name: draw(name, result, folder) for name, result in results.items()}
    drawn = {picture.path for each in pictures.values() for picture in each}
    for path in folder.glob("*.svg"):
        if path not in drawn:
            path.unlink()
    return pictures


def make_page(
    results: Results, missing: Mapping[str, str], pictures: Mapping[str, list[Picture]]
) -> str:
    """Return the full page, which is to be beside the folder of the results."""
    parts = ["# Figures", METHOD.strip()]
    if results:
        parts.append(f"Machine and versions: {machine_line(_first_machine(results))}.")
    if demands := demands_table(results):
        parts += ["## What was asked for", DEMANDS, demands]
    for name, result in results.items():
        experiment = EXPERIMENTS[name]
        # What an experiment does, its module says: "`name`: how long …".
        about = sys.modules[experiment.measure.__module__].__doc__ or ""
        about = about.strip().removeprefix(f"`{name}`: ")
        parts += [
            f"## {name.capitalize()}",
            about[:1].upper() + about[1:],
            *(_show(each, Path(RESULTS).name) for each in pictures[name]),
            experiment.format_result(result),
            _how_measured(name, result, _first_machine(results)),
        ]
    parts += ["## What the figures do not say", CAVEATS.strip()]
    if missing:
        reasons = "; ".join(f"{name}, {why}" for name, why in missing.items())
        parts.append(f"Left out: {reasons}.")
    return "\n\n".join(parts) + "\n"


def _show(picture: Picture, folder: str) -> str:
    return f"![{picture.shows}]({folder}/{picture.path.name})"


def _how_measured(name: str, result: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    machine = result["machine"]
    about = f"`python bench/run.py --only {name}`, {result['seconds'] / 60:.1f} minutes"
    if {**machine, "date": ""} == {**usual, "date": ""}:
        return f"{about}, {machine['date']}."
    return f"{about}, not as the others: {machine_line(machine)}."


def _first_machine(results: Results) -> Mapping[str, Any]:
    machine: Mapping[str, Any] = next(iter(results.values()))["machine"]
    return machine


def demands_table(results: Results) -> str:
    """Return what was asked of each kvstore and what it did, as tables; empty where nothing was."""
    speeds, demands = judge_speeds(results), judge(results)
    tables = []
    for engine in IMPLEMENTATIONS:
        if of_speed := [each for each in speeds if each.speed.own == engine]:
            tables.append(_speeds_of(engine, of_speed))
        if others := [each for each in demands if each.engine == engine]:
            tables.append(_demands_of(engine, others))
    return "\n\n".join(tables)


def _speeds_of(engine: str, speeds: Sequence[SpeedSeen]) -> str:
    experiments = dict.fromkeys(name for each in speeds for name in each.speed.experiments)
    counts = " and ".join(f"`{name}`" for name in experiments)
    return markdown_table(
        [f"times as fast {engine} is as (in {counts})", *OPERATIONS, "cases measured", "holds"],
        [
            [
                f"{each.speed.engine}, {' and '.join(f'{size:,}' for size in each.speed.sizes)} B",
                *(_factor(each, operation) for operation in OPERATIONS),
                f"{each.measured} of {each.wanted}",
                "in part" if each.holds and each.measured < each.wanted else _yes_or_no(each.holds),
            ]
            for each in speeds
        ],
    )


def _factor(seen: SpeedSeen, operation: str) -> str:
    """Return the worst factor, and what is asked for."""
    if operation not in seen.worst:
        return f"– (of {seen.speed.least[operation]:g})"
    factor = f"{seen.worst[operation].factor:.2f}"
    shown = factor if seen.holds_at(operation) else f"**{factor}**"
    return f"{shown} (of {seen.speed.least[operation]:g})"


def _demands_of(engine: str, demands: Sequence[Demand]) -> str:
    return markdown_table(
        [f"what else was asked of {engine}", "asked for", "measured", "holds"],
        [[each.what, each.wanted, each.measured, _yes_or_no(each.holds)] for each in demands],
    )


def _yes_or_no(holds: bool) -> str:
    return "yes" if holds else "**no**"


def make_short(results: Results, pictures: Mapping[str, list[Picture]]) -> str:
    """Return the part of the project's README."""
    parts = []
    if results:
        machine = _first_machine(results)
        parts.append(
            f"Measured on a shared {machine['cpu_count']}-core machine ({machine['cpu']}, "
            f"{machine['system']}, {machine['file_system']}, {machine['python']})."
        )
    parts.append(
        f"Method, all tables and charts, what was aimed for and missed, and what figures do not "
        f"say: [{PAGE}]({PAGE})."
    )
    if "operations" in results:
        parts += [_what_is_shown(results["operations"]), _short_table(results["operations"])]
    parts += [
        _show(picture, RESULTS)
        for each in pictures.values()
        for picture in each
        if picture.path.name in SHOWN
    ]
    if told := facts(results):
        parts.append(markdown_table(["what else", "figure"], told))
    return "\n\n".join(parts)


def _what_is_shown(result: Mapping[str, Any]) -> str:
    engines = result["rows"][0]["microseconds"]
    told = [
        f"`{engine}` is the {IMPLEMENTATIONS[engine]} implementation"
        for engine in IMPLEMENTATIONS
        if engine in engines
    ]
    own = _own_of(engines)
    beside = f", and how many times as long as {own}'s" if own else ""
    return "; ".join([f"Microseconds an operation takes{beside}", *told]) + ":"


def _short_table(result: Mapping[str, Any]) -> str:
    """Return the times of the smallest values, and how many times as fast kvstore is."""
    size = min(row["value_size"] for row in result["rows"])
    medians = {
        row["operation"]: {name: each["median"] for name, each in row["microseconds"].items()}
        for row in result["rows"]
        if row["value_size"] == size
    }
    engines = list(next(iter(medians.values())))
    return markdown_table(
        [f"values of {size:,} B", *medians],
        [[engine, *(_beside(engine, each) for each in medians.values())] for engine in engines],
    )


def _beside(engine: str, medians: Mapping[str, float]) -> str:
    own = _own_of(medians)
    figure = f"{medians[engine]:.1f}"
    if own is None or engine == own:
        return figure
    return f"{figure} ({medians[engine] / medians[own]:.2f}×)"


def _own_of(engines: Mapping[str, Any]) -> str | None:
    """Return which of kvstore's two the others are beside: the compiled one, if it is there."""
    return next((engine for engine in (COMPILED, PLAIN) if engine in engines), None)


def put_between_markers(text: str, part: str) -> str:
    """Return `text` with `part` between its two markers.

    Raises:
        ValueError: it does not have both of them, once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"expected {BEGIN!r} and then {END!r}, once each")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def make_report(root: Path) -> dict[str, str]:
    """Write charts and pages of the project in a folder; return what was left out, and why."""
    results, missing = read_results(root / RESULTS)
    pictures = draw_all(results, root / RESULTS)
    (root / PAGE).write_text(make_page(results, missing, pictures))
    readme = root / "README.md"
    readme.write_text(put_between_markers(readme.read_text(), make_short(results, pictures)))
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
