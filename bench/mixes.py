"""`mixes`: the mixes A, B and C of YCSB, over a Zipfian choice of records.

A store of 100,000 records of 1,000 bytes is made once for each engine; then, in turns, each does a
round of each mix. No engine here is asked to update in place, so an update is a delete and a
create. All choices are made before the clock is read, the same for all engines.
"""

import gc
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from engines import Engine, OpenEngine
from workers import Plan, Say, failed_rows, failures, ratios, show_spread, spread, steps_in_turns
from zipf import EXPONENT, Zipf

from harness import make_keys, make_values, markdown_table

MIXES: Final = {"A": 0.5, "B": 0.95, "C": 1.0}  # by name: the share of reads
VALUE_SIZE: Final = 1000
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
RECORDS: Final = 100_000
OPERATIONS: Final = 20_000  # of each mix in a round
ROUNDS: Final = 3
QUICK_RECORDS: Final = 2000
QUICK_OPERATIONS: Final = 1000
QUICK_ROUNDS: Final = 2

# A key to read; or with a value, to delete and create.
Order = tuple[str, dict[str, Any] | None]


def run_mixes(
    open_engine: OpenEngine, say: Say, folder: Path, records: int, operations: int, rounds: int
) -> Iterator[dict[str, float]]:
    """Task: make a store, yield nothing; then for each round the seconds that each mix took."""
    keys = make_keys(records)
    values = make_values(VALUE_SIZE, min(DISTINCT_VALUES, records))
    store = open_engine(folder)
    try:
        say("makes its records")
        for key, value in zip(keys, cycle(values)):
            store.create(key, value, TTL)
        yield {}
        for number in range(rounds):
            rng = random.Random(number)
            chosen = Zipf(records, rng)
            seconds = {}
            for mix, reads in MIXES.items():
                say(f"mix {mix}, round {number + 1} of {rounds}")
                orders: list[Order] = [
                    (keys[record], None if rng.random() < reads else rng.choice(values))
                    for record in chosen.choose(operations)
                ]
                seconds[mix] = time_orders(store, orders)
            yield seconds
    finally:
        store.close()


def time_orders(store: Engine, orders: list[Order]) -> float:
    """Return the seconds that the orders took."""
    create, read, delete = store.create, store.read, store.delete
    gc.collect()
    begin = perf_counter()
    for key, value in orders:
        if value is None:
            read(key)
        else:
            delete(key)
            create(key, value, TTL)
    return perf_counter() - begin


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return microseconds an operation, and ratios, by mix."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    operations = QUICK_OPERATIONS if plan.quick else OPERATIONS
    rounds = plan.rounds or (QUICK_ROUNDS if plan.quick else ROUNDS)
    courses = steps_in_turns(plan, run_mixes, records, operations, rounds)
    rows = []
    for mix, reads in MIXES.items():
        micros = {
            engine: [seconds[mix] / operations * 1e6 for seconds in course.items[1:]]
            for engine, course in courses.items()
            if course.failure is None
        }
        rows.append(
            {
                "mix": mix,
                "share_of_reads": reads,
                "microseconds": {engine: spread(each) for engine, each in micros.items()},
                "ratio_to_kvstore": ratios(micros),
                "rounds": micros,
            }
        )
    return {
        "value_size": VALUE_SIZE,
        "records": records,
        "operations": operations,
        "exponent": EXPONENT,
        "ttl": TTL,
        "failures": failures(courses),
        "rows": rows,
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows = result["rows"]
    others = rows[0]["ratio_to_kvstore"]
    table = [
        [
            engine,
            *(show_spread(row["microseconds"][engine]) for row in rows),
            *(f"{row['ratio_to_kvstore'].get(engine, 1):.2f}" for row in rows if others),
        ]
        for engine in rows[0]["microseconds"]
    ]
    headings = [
        "µs an operation",
        *(f"{row['mix']}, {row['share_of_reads']:.0%} reads" for row in rows),
        *(f"{row['mix']} / kvstore" for row in rows if others),
    ]
    return markdown_table(headings, table + failed_rows(result["failures"], len(headings)))
