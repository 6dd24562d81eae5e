"""`operations`: the time of create, read, a missed read and delete, for values of some sizes.

In each round each engine does for each size, on a new file: create all keys, read all in random
order, read as many absent keys, delete all in another random order. One pair of clock readings
surrounds each loop; the cost of the loop itself is the same for all. Garbage collection is on, as
by default. Keys and values are made before. Every engine does some rounds, and those that are fast
enough a few more.
"""

import gc
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from engines import Engine, OpenEngine
from workers import (
    Plan,
    Say,
    failures,
    ratios,
    show_spread,
    spread,
    steps_in_turns,
)

from harness import make_keys, make_values, markdown_table

OPERATIONS: Final = ("create", "read", "miss", "delete")
RECORDS: Final = {100: 100_000, 1000: 100_000, 16_000: 20_000}  # by size of value
QUICK_RECORDS: Final = {100: 2000, 1000: 2000, 16_000: 400}
TINY_RECORDS: Final = {100: 500}
ROUNDS: Final = 5
LEAST_ROUNDS: Final = 3
ALLOWANCE: Final = 8.0  # seconds that an engine has for a size, if it has done the least rounds
DISTINCT_VALUES: Final = 1000  # and no more than 2 MB of them: to make 16 MB takes seconds
TTL: Final = 3600
CHUNK: Final = 10_000  # creates between two looks at the clock

Micros = dict[str, float]  # that one of each operation took


def run_cycles(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    sizes: dict[int, int],
    rounds: int,
    least: int,
) -> Iterator[Micros]:
    """Task: for each size, in each round, do each operation for all keys; yield the microseconds.

    Where the time for a size is used up, and `least` rounds are done, nothing is done in the
    others of them, so that engines go on to the next size together.
    """
    for size, records in sizes.items():
        say(f"values of {size:,} bytes")
        keys = make_keys(records)
        absent = make_keys(records, first=records)
        values = make_values(size, min(DISTINCT_VALUES, 2_000_000 // size))
        took = 0.0
        for number in range(rounds):
            # Another round takes as long as one did so far.
            if number >= least and took + took / number > ALLOWANCE:
                yield {}
                continue
            begin = perf_counter()
            yield run_cycle(open_engine, folder / "cycle", keys, absent, values, number)
            took += perf_counter() - begin


def run_cycle(
    open_engine: OpenEngine,
    folder: Path,
    keys: list[str],
    absent: list[str],
    values: list[dict[str, Any]],
    seed: int,
    patience: float = inf,
) -> Micros:
    """Return the microseconds that each operation takes, in a new store in that folder."""
    folder.mkdir()
    try:
        with closing(open_engine(folder)) as store:
            return time_cycle(store, keys, absent, values, TTL, random.Random(seed), patience)
    finally:
        shutil.rmtree(folder)


def time_cycle(
    store: Engine,
    keys: list[str],
    absent: list[str],
    values: list[dict[str, Any]],
    ttl: int | None,
    rng: random.Random,
    patience: float = inf,
) -> Micros:
    """Create all keys, read and delete as many as there are absent ones; return the microseconds.

    Raises:
        TimeoutError: the creates took longer than `patience`, in seconds.
    """
    read, delete = store.read, store.delete
    count = len(absent)
    wanted, doomed = rng.sample(keys, count), rng.sample(keys, count)
    seconds: dict[str, float] = {}

    gc.collect()
    seconds["create"] = _time_creates(store, keys, values, ttl, patience)

    gc.collect()
    begin = perf_counter()
    for key in wanted:
        read(key)
    seconds["read"] = perf_counter() - begin

    hits = 0
    gc.collect()
    begin = perf_counter()
    for key in absent:
        try:
            read(key)
            hits += 1
        except KeyError:
            pass
    seconds["miss"] = perf_counter() - begin

    _check_work(store, keys, values, hits)
    gc.collect()
    begin = perf_counter()
    for key in doomed:
        delete(key)
    seconds["delete"] = perf_counter() - begin
    _expect(KeyError, read, doomed[0])
    _expect(KeyError, delete, doomed[0])
    done = dict.fromkeys(OPERATIONS, count) | {"create": len(keys)}
    return {operation: seconds[operation] / done[operation] * 1e6 for operation in OPERATIONS}


def _time_creates(
    store: Engine,
    keys: list[str],
    values: list[dict[str, Any]],
    ttl: int | None,
    patience: float,
) -> float:
    create = store.create
    value_of = cycle(values)
    begin = perf_counter()
    for first in range(0, len(keys), CHUNK):
        if perf_counter() - begin > patience:
            raise TimeoutError(f"{first:,} of {len(keys):,} records when its time was used up")
        for key, value in zip(keys[first : first + CHUNK], value_of, strict=False):
            create(key, value, ttl)
    return perf_counter() - begin


def _check_work(store: Engine, keys: list[str], values: list[dict[str, Any]], hits: int) -> None:
    """See that the store has done what was timed."""
    last = len(keys) - 1
    if hits or store.read(keys[last]) != values[last % len(values)]:
        raise AssertionError(f"{type(store).__name__} does not hold what was stored")
    _expect(Exception, store.create, keys[0], values[0], None)


def _expect(kind: type[Exception], function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except kind:
        return
    raise AssertionError(f"{function} of {arguments[0]!r} raised nothing")


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return microseconds an operation, and ratios, by size and operation."""
    sizes = TINY_RECORDS if plan.tiny else QUICK_RECORDS if plan.quick else RECORDS
    rounds = plan.rounds or (2 if plan.quick else ROUNDS)
    least = min(rounds, LEAST_ROUNDS)
    courses = steps_in_turns(plan, run_cycles, sizes, rounds, least)
    rows: list[dict[str, Any]] = []
    for number, (size, records) in enumerate(sizes.items()):
        cycles = {
            engine: [each for each in course.items[number * rounds :][:rounds] if each]
            for engine, course in courses.items()
        }
        rows += [{"value_size": size, **row} for row in rows_of(cycles, records, least)]
    return {"rounds": rounds, "ttl": TTL, "failures": failures(courses), "rows": rows}


def rows_of(cycles: dict[str, list[Micros]], records: int, least: int) -> list[dict[str, Any]]:
    """Return a row for each operation, of the engines that did at least so many rounds."""
    rows = []
    for operation in OPERATIONS:
        micros = {
            engine: [took[operation] for took in each]
            for engine, each in cycles.items()
            if len(each) >= least
        }
        rows.append(
            {
                "records": records,
                "operation": operation,
                "microseconds": {engine: spread(each) for engine, each in micros.items()},
                "ratio_to_kvstore": ratios(micros),
                "rounds": micros,
            }
        )
    return rows


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table for each size of value."""
    rows = result["rows"]
    sizes = dict.fromkeys(row["value_size"] for row in rows)
    tables = [
        format_rows(f"µs, {size:,} B", [row for row in rows if row["value_size"] == size])
        for size in sizes
    ]
    return "\n\n".join(tables + failure_lines(result["failures"]))


def format_rows(heading: str, rows: list[dict[str, Any]]) -> str:
    """Return what `rows_of` returned as a table, with a line for each engine."""
    operations = [row["operation"] for row in rows]
    others = rows[0]["ratio_to_kvstore"]
    return markdown_table(
        [
            heading,
            *operations,
            *(f"{operation} / kvstore" for operation in operations if others),
        ],
        [
            [
                engine,
                *(show_spread(row["microseconds"][engine]) for row in rows),
                *(f"{row['ratio_to_kvstore'].get(engine, 1):.2f}" for row in rows if others),
            ]
            for engine in rows[0]["microseconds"]
        ],
    )


def failure_lines(failed: dict[str, str]) -> list[str]:
    """Return lines for below the tables: who failed, and why."""
    return [f"{engine} failed: {why}" for engine, why in failed.items()]
