"""`threads`: throughput of one store that 1, 2, 4 and 8 threads work on, in operations a second.

They read, create, or do both; together the same number of operations however many they are, each
its own share of the keys. There are so many that one thread takes about a seventh of a second. What
was created is deleted before the next figure is taken.
"""

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from threading import Barrier
from time import perf_counter
from typing import Any, Final, TypeVar

from engines import Engine, OpenEngine
from workers import Plan, Say, failed_rows, failures, spread, steps_in_turns

from harness import key_of, make_keys, make_values, markdown_table

THREADS: Final = (1, 2, 4, 8)
LOADS: Final = {"read": 1.0, "create": 0.0, "90 % read, 10 % create": 0.9}  # the share of reads
VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
RECORDS: Final = 100_000
SECONDS: Final = 0.15  # that a figure is to take with one thread
ROUNDS: Final = 3
QUICK_RECORDS: Final = 2000
QUICK_SECONDS: Final = 0.01
QUICK_ROUNDS: Final = 1
MOST_OPERATIONS: Final = 40_000
TRIED: Final = 800  # operations, to find out how many there are to be

Part = TypeVar("Part")
Result = TypeVar("Result")
# A key to read; or with a value, to create.
Order = tuple[str, dict[str, Any] | None]


def run_together(
    work: Callable[[Part], Result], parts: Sequence[Part]
) -> tuple[float, list[Result]]:
    """Have a thread for each part do `work` on it; all start at once.

    Returns:
        The seconds from then until the last has ended, and what they returned.
    """
    gate = Barrier(len(parts) + 1)

    def run(part: Part) -> Result:
        gate.wait()
        return work(part)

    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(run, part) for part in parts]
        gate.wait()
        begin = perf_counter()
        results = [future.result() for future in futures]
        return perf_counter() - begin, results


def run_threads(
    open_engine: OpenEngine, say: Say, folder: Path, records: int, seconds: float, rounds: int
) -> Iterator[dict[str, list[float]]]:
    """Task: make a store, yield nothing; then for each round the operations a second.

    Of each load, by the number of threads.
    """
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    store = open_engine(folder)
    try:
        say("makes its records")
        for key, value in zip(make_keys(records), cycle(values)):
            store.create(key, value, TTL)
        enough = {
            load: enough_operations(store, records, reads, values, seconds)
            for load, reads in LOADS.items()
        }
        yield {}
        for number in range(rounds):
            rng = random.Random(number)
            figures: dict[str, list[float]] = {}
            for load, reads in LOADS.items():
                for threads in THREADS:
                    say(f"{load}, {threads} threads, round {number + 1} of {rounds}")
                    orders = make_orders(enough[load], records, reads, values, rng)
                    took = time_threads(store, orders, threads)
                    figures.setdefault(load, []).append(len(orders) / took)
            yield figures
    finally:
        store.close()


def enough_operations(
    store: Engine, records: int, reads: float, values: list[dict[str, Any]], seconds: float
) -> int:
    """Return how many operations one thread does in `seconds`: whole shares of `TRIED`."""
    orders = make_orders(TRIED, records, reads, values, random.Random(0))
    tried = min(time_threads(store, orders, 1) for _ in range(3))
    return min(max(round(seconds / tried), 1) * TRIED, MOST_OPERATIONS)


def make_orders(
    count: int, records: int, reads: float, values: list[dict[str, Any]], rng: random.Random
) -> list[Order]:
    """Return reads of random keys among `records`, and creates of keys that are not there."""
    orders: list[Order] = []
    for number in range(count):
        if rng.random() < reads:
            orders.append((key_of(rng.randrange(records)), None))
        else:
            orders.append((key_of(records + number), values[number % len(values)]))
    return orders


def time_threads(store: Engine, orders: list[Order], threads: int) -> float:
    """Return the seconds that so many threads took; then delete what they created."""
    create, read = store.create, store.read

    def work(part: list[Order]) -> None:
        for key, value in part:
            if value is None:
                read(key)
            else:
                create(key, value, TTL)

    gc.collect()
    seconds, _ = run_together(work, [orders[first::threads] for first in range(threads)])
    for key, value in orders:
        if value is not None:
            store.delete(key)
    return seconds


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return operations a second by load and number of threads."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    seconds = QUICK_SECONDS if plan.quick else SECONDS
    rounds = plan.rounds or (QUICK_ROUNDS if plan.quick else ROUNDS)
    courses = steps_in_turns(plan, run_threads, records, seconds, rounds)
    return {
        "value_size": VALUE_SIZE,
        "records": records,
        "ttl": TTL,
        "failures": failures(courses),
        "rows": [
            {
                "engine": engine,
                "load": load,
                "operations_per_second": {
                    threads: spread([figures[load][index] for figures in course.items[1:]])
                    for index, threads in enumerate(THREADS)
                },
            }
            for load in LOADS
            for engine, course in courses.items()
            if course.failure is None
        ],
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows = []
    for row in result["rows"]:
        figures = list(row["operations_per_second"].values())
        speed_up = figures[-1]["median"] / figures[0]["median"]
        rows.append(
            [
                f"{row['engine']}, {row['load']}",
                *("{median:,.0f} ({min:,.0f}–{max:,.0f})".format(**each) for each in figures),
                f"{speed_up:.2f}",
            ]
        )
    headings = [
        "operations a second",
        *(f"{threads} thread{'s' * (threads > 1)}" for threads in THREADS),
        f"{THREADS[-1]} threads / 1",
    ]
    return markdown_table(headings, rows + failed_rows(result["failures"], len(headings)))
