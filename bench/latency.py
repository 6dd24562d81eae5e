"""How long each create and read takes while a store grows to a million records, and each put.

No pause hides in a mean: each create is timed by itself, and after each 5,000 of them 1,000 reads
of random records likewise. A million puts, none of which is synced, go to random records of 100,000
that were there when a second store was opened, and so synced. With the creates comes a control, by
the same clock: a loop of some microseconds that calls nothing and touches no memory. What it takes
longer now and then is caused by the machine, or by threads that the engine has in the background.
Engines that are fast enough do more rounds, in new processes; percentiles are medians of the
rounds'. Who does not get to the million in its time is measured as far as it got.
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
from operations import FASTEST, TTL, time_writes
from records import key_of, make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, engine_table, spread, with_failures

TIMED: Final = ("create", "read", "put", "control")
VALUE_SIZE: Final = 100
RECORDS: Final = 1_000_000
PUTS: Final = 1_000_000
REPLACED: Final = 10  # times that each record is, on average
ROUNDS: Final = 5
PATIENCE: Final = (30.0, 7.0)  # seconds that kvstore has to grow, and another; half of it to put
SECONDS: Final = (36.0, 16.0)  # for all rounds of the fastest, and of another, beyond the first
CREATES: Final = 5000  # in a row
READS: Final = 1000  # after them; and so many of the control
CONTROL_LOOPS: Final = 300

Times = dict[str, "array[int]"]  # nanoseconds that each of `TIMED` took


def grow_timed(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    _round: int,
    records: int,
    puts: int,
    seconds: float,
) -> Times:
    """Task: let a store grow as far as the time allows, put to another; return all times."""
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
    if puts:
        times["put"] = put_timed(open_engine, say, folder / "replaced", puts, seconds / 2)
    return times


def put_timed(
    open_engine: OpenEngine, say: Say, folder: Path, puts: int, seconds: float
) -> "array[int]":
    """Replace values that were synced, as often as the time allows; return the times."""
    folder.mkdir()
    keys, values = make_keys(puts // REPLACED), make_values(VALUE_SIZE)
    with closing(open_engine(folder)) as store:
        time_writes(store.create, keys, values)
    rng = random.Random(2)
    took = array("q")
    end = perf_counter() + seconds
    with closing(open_engine(folder)) as store:
        while len(took) < puts and perf_counter() < end:
            say(f"put {len(took):,} records")
            wanted = rng.choices(keys, k=min(CREATES, puts - len(took)))
            took += time_each(store.put, [(key, rng.choice(values), TTL) for key in wanted])
    return took


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
    records, puts = plan.pick((RECORDS, PUTS), (10_000, 10_000), (3000, 3000))
    return measure_growth(plan, records, puts, rounds, SECONDS)


def measure_growth(
    plan: Plan, records: int, puts: int, rounds: int, seconds: tuple[float, float]
) -> dict[str, Any]:
    """Let all stores grow in some rounds; return percentiles by engine and operation.

    In `seconds` rounds of the fastest and of other engines are to fit, but for the first.
    """
    # It is for those who measure: the processes of the engines may not have its library.
    from percentiles import percentiles

    jobs = [
        Job(
            engine,
            engine,
            (records, puts, PATIENCE[not kind.is_own]),
            rounds,
            seconds=seconds[engine not in FASTEST],
        )
        for engine, kind in plan.engines.items()
    ]
    results, failures = rounds_in_turns(plan, grow_timed, jobs)
    return {
        "value_size": VALUE_SIZE,
        "records": records,
        "puts": puts,
        "failures": failures,
        "engines": {
            engine: {
                "records": min(len(each["create"]) for each in times),
                "puts": min(len(each["put"]) for each in times),
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
        counted = "puts" if timed == "put" else "records"
        columns.append((counted, "{:,}".format, (counted,)))
        columns.append(("rounds", str, ("microseconds", timed, "max", "rounds")))
        tables.append(engine_table(f"{timed}, µs", engines, columns))
    return with_failures(tables, result["failures"])
