"""Two builds of kvstore in turns, old and new: what each operation takes, and the ratio of medians.

Each build is that of a Python, of an environment that has it and the libraries it needs; of the
benchmark's own it needs none. Only the public API is used, so that any two versions will do.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import inf
from typing import Any, Final

import latency
import operations
from engines import ENGINES, Kind
from engines.own import COMPILED, version_of
from latency import TIMED
from operations import OPERATIONS

from harness import Plan, markdown_table, ratio, show_spread, with_failures

EXPERIMENTS: Final = ("operations", "latency")
ROUNDS: Final = {"operations": 15, "latency": 5}

_OLD, _NEW = "{}, old", "{}, new"


def builds(engines: list[str] | None, old: str, new: str) -> dict[str, Kind]:
    """Return the engines of both builds; without names of any, that of the compiled kvstore."""
    return {
        name.format(engine): ENGINES[engine]._replace(
            python=python, version=partial(version_of, engine, python)
        )
        for engine in engines or [COMPILED]
        for name, python in ((_OLD, old), (_NEW, new))
    }


def compare(plan: Plan, experiment: str) -> str:
    """Measure one of `EXPERIMENTS`; return its tables."""
    rounds = plan.rounds or plan.pick(ROUNDS[experiment], 2)
    if experiment == "operations":
        cases = plan.pick(operations.FULL, operations.QUICK, operations.TINY)
        # There is no time for the largest.
        cases = tuple(case._replace(seconds=inf) for case in cases if not case.engines)
        result = operations.measure_cases(plan, cases, rounds)
        lines = _operations(result)
    else:
        records = plan.pick(latency.RECORDS, 10_000, 1000)
        result = latency.measure_growth(plan, records, 0, rounds, (inf, inf))
        lines = _percentiles(result)
    table = markdown_table(["µs", "old", "new", "new / old"], list(lines))
    return with_failures([table], result["failures"])


def _operations(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for case in result["cases"]:
        for operation in OPERATIONS:
            figures = case["microseconds"].get(operation, {})
            yield from _rows(f"{operation}, {case['name']}", figures)


def _percentiles(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for timed in TIMED:
        by_engine = {name: each["microseconds"][timed] for name, each in result["engines"].items()}
        shares = list(next(iter(by_engine.values()), {}))
        for share in shares:
            figures = {name: each[share] for name, each in by_engine.items() if share in each}
            yield from _rows(f"{timed}, {share}", figures)


def _rows(what: str, figures: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    """Yield a row for each implementation that both builds have figures of."""
    for engine in ENGINES:
        old, new = (figures.get(name.format(engine)) for name in (_OLD, _NEW))
        if old and new:
            shown = f"{ratio(new, old):.3f}"
            yield [f"{engine}: {what}", show_spread(old, 3), show_spread(new, 3), shown]
