"""`durable`: creates and deletes that are on stable storage when they return, by 1 and 8 threads.

Beside each other are the engines that can do it: kvstore with durable=True, SQLite in WAL mode with
synchronous=FULL, LMDB with its flushes on, and others. In turns each does a round: for a while each
one thread creates, then deletes what was created, and eight threads do the same on the same store.
Each operation is timed by itself. The figures are those of the disk and of who shares flushes; on
tmpfs they mean nothing.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any, Final

from engines import ENGINES, OpenEngine
from histogram import Histogram
from threads import run_together
from workers import Plan, Say, failed_rows, failures, spread, steps_in_turns

from harness import file_system, make_keys, make_values, markdown_table

THREADS: Final = (1, 8)
OPERATIONS: Final = ("create", "delete")
VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
RECORDS: Final = 10_000  # that are there before
SECONDS: Final = 0.7
ROUNDS: Final = 5
QUICK_RECORDS: Final = 100
QUICK_SECONDS: Final = 0.05
QUICK_ROUNDS: Final = 1
MOST_OPERATIONS: Final = 10_000  # of a thread in one go

# Nanoseconds that each operation took, for each thread; and the seconds for all of them.
Took = tuple[float, list[list[int]]]
# An operation and the number of threads that did it.
Case = tuple[str, int]


def run_durable(
    open_engine: OpenEngine, say: Say, folder: Path, records: int, seconds: float, rounds: int
) -> Iterator[dict[Case, Took]]:
    """Task: make a store, yield nothing; then for each round what each case took."""
    values = make_values(VALUE_SIZE, DISTINCT_VALUES)
    store = open_engine(folder)
    try:
        say("makes its records")
        for key, value in zip(make_keys(records), cycle(values)):
            store.create(key, value, TTL)
    finally:
        store.close()
    store = open_engine(folder, durable=True)

    def create(key: str) -> None:
        store.create(key, values[int(key, 16) % len(values)], TTL)

    try:
        yield {}
        for number in range(rounds):
            cases: dict[Case, Took] = {}
            for threads in THREADS:
                say(f"{threads} threads, round {number + 1} of {rounds}")
                keys = make_keys(MOST_OPERATIONS * threads, first=records)
                parts = [keys[first::threads] for first in range(threads)]
                created = cases["create", threads] = time_until(seconds, create, parts)
                parts = [part[: len(took)] for part, took in zip(parts, created[1], strict=True)]
                deleted = cases["delete", threads] = time_until(seconds, store.delete, parts)
                for part, took in zip(parts, deleted[1], strict=True):
                    for key in part[len(took) :]:
                        store.delete(key)
            yield cases
    finally:
        store.close()


def time_until(
    seconds: float, operation: Callable[[str], object], parts: Sequence[Sequence[str]]
) -> Took:
    """Have a thread for each part do the operation for its keys, until the time is over."""
    gc.collect()

    def work(keys: Sequence[str]) -> list[int]:
        took: list[int] = []
        begin = perf_counter_ns()
        end = begin + round(seconds * 1e9)
        for key in keys:
            if begin >= end:
                break
            operation(key)
            now = perf_counter_ns()
            took.append(now - begin)
            begin = now
        return took

    return run_together(work, parts)


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return operations a second and percentiles, by engine and case."""
    able = [engine for engine in plan.engines if ENGINES[engine].can_be_durable]
    seconds = QUICK_SECONDS if plan.quick else SECONDS
    rounds = plan.rounds or (QUICK_ROUNDS if plan.quick else ROUNDS)
    courses = steps_in_turns(
        plan.only(able), run_durable, QUICK_RECORDS if plan.quick else RECORDS, seconds, rounds
    )
    return {
        "file_system": file_system(plan.place),
        "value_size": VALUE_SIZE,
        "ttl": TTL,
        "not_durable": [engine for engine in plan.engines if engine not in able],
        "failures": failures(courses),
        "rows": [
            summarise(engine, operation, course.items[1:])
            for operation in OPERATIONS
            for engine, course in courses.items()
            if course.failure is None
        ],
    }


def summarise(engine: str, operation: str, rounds: list[dict[Case, Took]]) -> dict[str, Any]:
    """Return an engine's figures for one operation."""
    per_second = {
        threads: [
            sum(map(len, by_thread)) / seconds
            for seconds, by_thread in (each[operation, threads] for each in rounds)
        ]
        for threads in THREADS
    }
    latency = {}
    for threads in THREADS:
        histogram = Histogram()
        for each in rounds:
            for took in each[operation, threads][1]:
                histogram.add(took)
        latency[threads] = histogram.summary()
    return {
        "engine": engine,
        "operation": operation,
        "operations_per_second": {
            threads: spread(figures) for threads, figures in per_second.items()
        },
        "speed_up": median(
            many / one for one, many in zip(*(per_second[each] for each in THREADS), strict=True)
        ),
        "microseconds": latency,
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    one, many = THREADS
    headings = [
        "operations a second",
        *(f"{threads} thread{'s' * (threads > 1)}" for threads in THREADS),
        f"{many} threads / {one}",
        *(
            f"{threads} thread{'s' * (threads > 1)}: {name}, µs"
            for threads in THREADS
            for name in ("p50", "p99", "max")
        ),
    ]
    rows = [
        [
            f"{row['engine']}, {row['operation']}",
            *(
                "{median:,.0f} ({min:,.0f}–{max:,.0f})".format(**figures)
                for figures in row["operations_per_second"].values()
            ),
            f"{row['speed_up']:.2f}",
            *(
                f"{figures[name]:,.0f}"
                for figures in row["microseconds"].values()
                for name in ("p50", "p99", "max")
            ),
        ]
        for row in result["rows"]
    ]
    table = markdown_table(headings, rows + failed_rows(result["failures"], len(headings)))
    return (
        f"On {result['file_system']}. Cannot wait for the disk, or not by an operation: "
        f"{', '.join(result['not_durable']) or 'none'}.\n\n{table}"
    )
