"""kvstore beside what its user would pick instead: measures, prints and saves the figures.

    python bench/run.py --quick                     all of it, small, in under three minutes
    python bench/run.py                             all of it, in about an hour
    python bench/run.py --only growth,memory        some of it anew; the other results stay
    python bench/run.py --only operations --engines kvstore,sqlite3,lmdb

Each experiment is a module beside this one; what it measured goes to `bench/results/NAME.json`, but
for that of a quick run or of some engines only, which goes nowhere unless `--results` says where.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import anatomy
import dataset
import durable
import growth
import harm
import latency
import limited
import memory
import million
import mixes
import opening
import operations
import space
import threads
from engines import ENGINES, importable, versions
from workers import Plan, Skipped

from harness import RESULT_FORMAT, RESULTS, Progress, describe_machine, machine_line, to_json


class Experiment(NamedTuple):
    """What a module of the same name measures."""

    measure: Callable[[Plan], dict[str, Any]]
    format_result: Callable[[dict[str, Any]], str]


EXPERIMENTS: Final = {
    "operations": Experiment(operations.measure, operations.format_result),
    "million": Experiment(million.measure, million.format_result),
    "dataset": Experiment(dataset.measure, dataset.format_result),
    "mixes": Experiment(mixes.measure, mixes.format_result),
    "growth": Experiment(growth.measure, growth.format_result),
    "latency": Experiment(latency.measure, latency.format_result),
    "threads": Experiment(threads.measure, threads.format_result),
    "durable": Experiment(durable.measure, durable.format_result),
    "memory": Experiment(memory.measure, memory.format_result),
    "limited": Experiment(limited.measure, limited.format_result),
    "opening": Experiment(opening.measure, opening.format_result),
    "space": Experiment(space.measure, space.format_result),
    "harm": Experiment(harm.measure, harm.format_result),
    "anatomy": Experiment(anatomy.measure, anatomy.format_result),
}


def parse_arguments() -> argparse.Namespace:
    """Return what the command line says, checked."""
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description=__doc__.partition("\n")[0],
        epilog=f"experiments: {', '.join(EXPERIMENTS)}; engines: {', '.join(ENGINES)}",
    )
    parser.add_argument("--quick", action="store_true", help="small and short; see if it works")
    parser.add_argument("--tiny", action="store_true", help="smaller still, for a test of this")
    parser.add_argument("--only", type=_names_of(EXPERIMENTS), help="experiments, with commas")
    parser.add_argument("--engines", type=_names_of(ENGINES), help="engines, with commas")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument(
        "--dir", type=Path, help="folder for the stores (default: the temporary folder)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the figures (default: bench/results; none with --quick, --engines)",
    )
    return parser.parse_args()


def _names_of(known: dict[str, Any]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: unknown, there are {', '.join(known)}"
            )
        return given

    return names


def main() -> None:
    """Measure, print and save."""
    arguments = parse_arguments()
    asked = arguments.engines or list(ENGINES)
    engines = importable(asked)
    for engine in asked:
        if engine not in engines:
            print(f"left out: {engine}, {ENGINES[engine].wanting}", file=sys.stderr)
    if not engines:
        sys.exit("none of the engines is there")
    quick = arguments.quick or arguments.tiny
    results = arguments.results or (None if quick or arguments.engines else RESULTS)
    progress = Progress()
    names = arguments.only or list(EXPERIMENTS)
    for number, name in enumerate(names, start=1):
        progress.heading = f"{name} ({number} of {len(names)}): "
        experiment = EXPERIMENTS[name]
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=arguments.dir) as place:
            machine = describe_machine(Path(place), ["orjson"], versions(engines))
            plan = Plan(Path(place), engines, quick, arguments.rounds, progress, arguments.tiny)
            try:
                result = experiment.measure(plan)
            except Skipped as reason:
                print(f"## {name}\n\nskipped: {reason}\n", flush=True)
                continue
        seconds = time.monotonic() - started
        saved = {
            "format": RESULT_FORMAT,
            "machine": machine,
            "quick": quick,
            "seconds": seconds,
            **result,
        }
        text = to_json(saved) + "\n"
        progress.clear()
        print(f"## {name} ({seconds:.0f} s)\n\n{machine_line(machine)}\n")
        # As it reads back, numbers that were keys being strings then: so will the report have it.
        print(experiment.format_result(json.loads(text)), end="\n\n", flush=True)
        if results is not None:
            results.mkdir(parents=True, exist_ok=True)
            (results / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
