"""`operations`: the time of create, read, a missed read and delete, for values of some sizes.

In each round each engine does for each size, on a new file: create all keys, read all in random
order, read as many absent keys, delete all in another random order. One pair of clock readings
surrounds each loop; the cost of the loop itself is the same for all. Garbage collection is on, as
by default. Keys and values are made before.
"""

import gc
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from engines import Engine, OpenEngine
from workers import Plan, Say, Worker, in_turns, noting_failure, ratios, show_spread, spread

from harness import make_keys, make_values, markdown_table

OPERATIONS: Final = ("create", "read", "miss", "delete")
RECORDS: Final = {100: 100_000, 1000: 100_000, 16_000: 20_000}  # by size of value
QUICK_RECORDS: Final = {100: 5000, 1000: 5000, 16_000: 1000}
TINY_RECORDS: Final = {100: 500}
ROUNDS: Final = 5
DISTINCT_VALUES: Final = 1000  # and no more than 2 MB of them: to make 16 MB takes seconds
TTL: Final = 3600


def run_cycle(
    open_engine: OpenEngine, say: Say, directory: Path, size: int, records: int, seed: int
) -> dict[str, float]:
    """Task: do each operation for all keys on a new store; return the seconds of each."""
    say(f"values of {size:,} bytes")
    keys = make_keys(records)
    absent = make_keys(records, first=records)
    values = make_values(size, min(DISTINCT_VALUES, 2_000_000 // size))
    directory.mkdir()
    try:
        store = open_engine(directory)
        try:
            return time_cycle(store, keys, absent, values, TTL, random.Random(seed))
        finally:
            store.close()
    finally:
        shutil.rmtree(directory)


def time_cycle(
    store: Engine,
    keys: list[str],
    absent: list[str],
    values: list[dict[str, Any]],
    ttl: int | None,
    rng: random.Random,
) -> dict[str, float]:
    """Return the seconds that each operation took for all keys."""
    create, read, delete = store.create, store.read, store.delete
    shuffled = rng.sample(keys, len(keys))
    seconds: dict[str, float] = {}

    gc.collect()
    begin = perf_counter()
    for key, value in zip(keys, cycle(values)):
        create(key, value, ttl)
    seconds["create"] = perf_counter() - begin

    gc.collect()
    begin = perf_counter()
    for key in shuffled:
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
    rng.shuffle(shuffled)
    gc.collect()
    begin = perf_counter()
    for key in shuffled:
        delete(key)
    seconds["delete"] = perf_counter() - begin
    _expect(KeyError, read, keys[0])
    _expect(KeyError, delete, keys[0])
    return seconds


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
    micros: dict[tuple[int, str], dict[str, list[float]]] = {}
    failures: dict[str, str] = {}
    with ExitStack() as stack:
        workers = {
            engine: stack.enter_context(Worker(engine, plan.progress)) for engine in plan.engines
        }
        for size, records in sizes.items():
            for operation in OPERATIONS:
                micros[size, operation] = {engine: [] for engine in plan.engines}
            for number, engine in in_turns(plan.engines, rounds):
                if engine in failures:
                    continue
                folder = plan.place / f"{engine}-{size}-{number}"
                with noting_failure(failures, engine):
                    seconds = workers[engine].call(run_cycle, folder, size, records, number)
                    for operation in OPERATIONS:
                        micros[size, operation][engine].append(seconds[operation] / records * 1e6)
    for by_engine in micros.values():
        for engine in failures:
            del by_engine[engine]
    return {
        "rounds": rounds,
        "ttl": TTL,
        "failures": failures,
        "rows": [
            {
                "value_size": size,
                "records": sizes[size],
                "operation": operation,
                "microseconds": {engine: spread(each) for engine, each in by_engine.items()},
                "ratio_to_kvstore": ratios(by_engine),
                "rounds": by_engine,
            }
            for (size, operation), by_engine in micros.items()
        ],
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table for each size of value."""
    tables = []
    for size in dict.fromkeys(row["value_size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["value_size"] == size]
        operations = [row["operation"] for row in rows]
        others = rows[0]["ratio_to_kvstore"]
        table = markdown_table(
            [
                f"µs, {size:,} B",
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
        tables.append(table)
    tables += [f"{engine} failed: {why}" for engine, why in result["failures"].items()]
    return "\n\n".join(tables)
