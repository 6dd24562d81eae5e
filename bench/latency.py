"""How long each single create and read takes while a store grows to a million records.

No pause hides in a mean: each create is timed by itself, and after each 5,000 of them 1,000 reads
of random records likewise. Then comes a control, by the same clock: a loop of some microseconds
that calls nothing and touches no memory. What it takes longer now and then is caused by the
machine, or by threads that the engine has in the background. Engines that are fast enough do more
rounds, in new processes; percentiles are medians of the rounds'.
"""

import random
from array import array
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, Final

from engines import OpenEngine
from operations import TTL
from records import key_of, make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, engine_table, spread, with_failures

TIMED: Final = ("create", "read", "control")
VALUE_SIZE: Final = 100
RECORDS: Final = 1_000_000
ROUNDS: Final = 3
PATIENCE: Final = (30.0, 7.0)  # seconds that kvstore has to grow, and another engine
SECONDS: Final = 16.0  # for all of its rounds, beyond the first
CREATES: Final = 5000  # in a row
READS: Final = 1000  # after them; and so many of the control
CONTROL_LOOPS: Final = 300

Times = dict[str, "array[int]"]  # nanoseconds that each of `TIMED` took


def grow_timed(
    open_engine: OpenEngine, say: Say, folder: Path, _round: int, records: int, seconds: float
) -> Times:
    """Task: let a store grow as far as the time allows; return all times."""
    values = cycle(make_values(VALUE_SIZE))
    rng = random.Random(1)
    times: Times = {name: array("q") for name in TIMED}
    end = perf_counter() + seconds
    with closing(open_engine(folder)) as store:
        for first in range(0, records, CREATES):
            if perf_counter() > end:
                break
            say(f"has {first:,} records")
            count = min(CREATES, records - first)
            keys = make_keys(count, first)
            calls = [
                (key, value, TTL) for key, value in zip(keys, islice(values, count), strict=True)
            ]
            times["create"] += time_each(store.create, calls)
            wanted = [(key_of(rng.randrange(first + count)),) for _ in range(READS)]
            times["read"] += time_each(store.read, wanted)
            times["control"] += time_each(spin, [(CONTROL_LOOPS,)] * READS)
    return times


def time_each(function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> "array[int]":
    """Return the nanoseconds that each call took."""
    clock = perf_counter_ns
    took = array("q")
    for arguments in calls:
        begin = clock()
        function(*arguments)
        took.append(clock() - begin)
    return took


def spin(count: int) -> None:
    """Keep the processor busy, and nothing else."""
    for _ in range(count):
        pass


def measure(plan: Plan) -> dict[str, Any]:
    """Let all stores grow; return the percentiles of each engine."""
    rounds = plan.rounds or plan.pick(ROUNDS, 1)
    return measure_growth(plan, plan.pick(RECORDS, 10_000, 3000), rounds, SECONDS)


def measure_growth(plan: Plan, records: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Let all stores grow in some rounds; return percentiles by engine and operation."""
    # It is for those who measure: the processes of the engines may not have its library.
    from percentiles import percentiles

    jobs = [
        Job(engine, engine, (records, PATIENCE[not kind.is_own]), rounds, seconds=seconds)
        for engine, kind in plan.engines.items()
    ]
    results, failures = rounds_in_turns(plan, grow_timed, jobs)
    return {
        "value_size": VALUE_SIZE,
        "records": records,
        "failures": failures,
        "engines": {
            engine: {
                "records": min(len(each["create"]) for each in times),
                "microseconds": {
                    name: _spreads([percentiles([each[name]]) for each in times]) for name in TIMED
                },
            }
            for engine, times in results.items()
            if times
        },
    }


def _spreads(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the spread of each percentile that all rounds have."""
    shared = [name for name in rounds[0] if all(name in each for each in rounds)]
    return {name: spread([each[name] for each in rounds]) for name in shared}


def format_result(result: Mapping[str, Any]) -> str:
    """Return the percentiles as a table for each operation."""
    engines = result["engines"]
    names = dict.fromkeys(
        name for each in engines.values() for name in each["microseconds"]["create"]
    )
    tables = []
    for timed in TIMED:
        columns: list[Column] = [
            (name, "{:,.1f}".format, ("microseconds", timed, name, "median")) for name in names
        ]
        columns.append(("records", "{:,}".format, ("records",)))
        columns.append(("rounds", str, ("microseconds", timed, "max", "rounds")))
        tables.append(engine_table(f"{timed}, µs", engines, columns))
    return with_failures(tables, result["failures"])
