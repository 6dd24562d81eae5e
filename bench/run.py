"""kvstore beside what its user would pick instead: measures, prints and saves the figures.

    python bench/run.py                     all of it, in 43 minutes
    python bench/run.py --quick             all of it, small, in five
    python bench/run.py --only latency      a part anew; the other results stay
    python bench/run.py --only operations --engines kvstore,sqlite3,lmdb
    python bench/run.py --only latency,durable --engines kvstore,lmdb,tkrzw --rounds 3
    python bench/run.py --compare OLD NEW   two builds of kvstore, each that of a Python

Each experiment is a module beside this one; what it measured goes to `bench/results/NAME.json`, but
for that of a quick run or of some engines only, which goes nowhere unless `--results` says where.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import compare
from engines import ENGINES, importable
from targets import judge, targets_table

from harness import (
    RESULT_FORMAT,
    RESULTS,
    Plan,
    Progress,
    Skipped,
    describe_machine,
    machine_line,
    to_json,
)

EXPERIMENTS: Final = ("operations", "latency", "batches", "durable", "footprint", "failures")


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says, checked."""
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=__doc__.partition("\n")[0],
        epilog=f"experiments: {', '.join(EXPERIMENTS)}; engines: {', '.join(ENGINES)}",
    )
    scales = parser.add_mutually_exclusive_group()
    for scale, text in (("quick", "small and short; see if it works"), ("tiny", "smaller still")):
        scales.add_argument(
            f"--{scale}", dest="scale", action="store_const", const=scale, default="full", help=text
        )
    parser.add_argument("--only", type=_names_of(EXPERIMENTS), help="experiments, with commas")
    parser.add_argument("--engines", type=_names_of(ENGINES), help="engines, with commas")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help=f"measure two builds of kvstore in turns: {', '.join(compare.EXPERIMENTS)}",
    )
    parser.add_argument(
        "--dir", type=Path, help="folder for the stores (default: the temporary folder)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the figures (default: bench/results; none with --quick, --engines)",
    )
    return parser.parse_args()


def _names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")).difference(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
        return text.split(",")

    return names


def run(name: str, plan: Plan, results: Path | None) -> dict[str, Any]:
    """Do one experiment, print its figures and save them; return them as they read back."""
    experiment = import_module(name)
    started = time.monotonic()
    machine = describe_machine(plan)
    try:
        result = experiment.measure(plan)
    except Skipped as reason:
        print(f"## {name}\n\nskipped: {reason}\n", flush=True)
        return {}
    seconds = round(time.monotonic() - started)
    header = {"format": RESULT_FORMAT, "machine": machine, "scale": plan.scale, "seconds": seconds}
    text = to_json({**header, **result})
    plan.progress.show("")
    print(f"## {name} ({seconds} s)\n\n{machine_line(machine)}\n")
    # As it reads back, numbers that were keys being strings then: so will the report have it.
    kept: dict[str, Any] = json.loads(text)
    print(experiment.format_result(kept), end="\n\n", flush=True)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        (results / f"{name}.json").write_text(text)
    return kept


def main() -> None:
    """Measure, print and save."""
    arguments = parse_arguments()
    asked = arguments.engines or list(ENGINES)
    left_out: dict[str, str] = {}
    if arguments.compare:
        engines = compare.builds(arguments.engines, *arguments.compare)
    else:
        engines = importable(asked)
        left_out = {name: ENGINES[name].wanting for name in asked if name not in engines}
        for name, why in left_out.items():
            print(f"left out: {name}, {why}", file=sys.stderr)
    if not engines:
        sys.exit("none of the engines is there")
    default = None if arguments.scale != "full" or arguments.engines else RESULTS
    progress = Progress()
    names = arguments.only or (compare.EXPERIMENTS if arguments.compare else EXPERIMENTS)
    measured: dict[str, Any] = {}
    for number, name in enumerate(names, start=1):
        progress.heading = f"{name} ({number} of {len(names)}): "
        with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=arguments.dir) as place:
            plan = Plan(Path(place), engines, arguments.scale, arguments.rounds, progress, left_out)
            if arguments.compare:
                tables = compare.compare(plan, name)
                progress.show("")
                machine = machine_line(describe_machine(plan))
                print(f"## {name}\n\n{machine}\n\n{tables}\n", flush=True)
            else:
                measured[name] = run(name, plan, arguments.results or default)
    if targets := judge(measured):
        print(f"## targets\n\n{targets_table(targets)}")


if __name__ == "__main__":
    main()
