"""`latency`: how long each single create and read takes while a store grows to 1,000,000 records.

No pause hides in a mean: each create is timed by itself, and after each 5,000 of them 1,000 reads
of random records likewise. The longest creates are told with the number of the record. After them
comes a control, by the same clock: a loop of some microseconds that calls nothing and touches no
memory. What it takes longer now and then is the doing of the machine, of what else runs on it, or
of threads that the engine has in the background.
"""

import heapq
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, Final

from engines import Engine, OpenEngine
from histogram import Histogram
from workers import Plan, Say, failed_rows, failures, steps_in_turns

from harness import key_of, make_keys, make_values, markdown_table

TIMED: Final = ("create", "read", "control")
VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
RECORDS: Final = 1_000_000
QUICK_RECORDS: Final = 10_000
ALLOWANCE: Final = 40.0  # seconds that an engine has for all of it
CREATES: Final = 5000  # in a row
READS: Final = 1000  # after them; and so many of the control
TURN: Final = 50_000  # records that are created before it is another engine's turn
LONGEST: Final = 10  # creates that are told
CONTROL_LOOPS: Final = 300


class Watch:
    """A store that grows under the eyes of a clock."""

    def __init__(self, store: Engine) -> None:
        self.count = 0
        self._store = store
        self._values = make_values(VALUE_SIZE, DISTINCT_VALUES)
        self._rng = random.Random(1)
        self._histograms = {name: Histogram() for name in TIMED}
        self._longest: list[tuple[int, int]] = []  # nanoseconds, number of the record
        self._longest_of_row: list[int] = []

    def go_on(self, creates: int) -> None:
        """Time so many creates in a row, then reads, then the control."""
        store, first = self._store, self.count
        keys = make_keys(creates, first)
        values = islice(cycle(self._values), creates)
        took = time_each(store.create, [(*each, TTL) for each in zip(keys, values, strict=True)])
        self._histograms["create"].add(took)
        numbered = zip(took, range(first, first + creates), strict=True)
        self._longest = heapq.nlargest(LONGEST, [*self._longest, *numbered])
        self._longest_of_row.append(max(took))
        self.count += creates
        wanted = [(key_of(self._rng.randrange(self.count)),) for _ in range(READS)]
        self._histograms["read"].add(time_each(store.read, wanted))
        self._histograms["control"].add(time_each(spin, [(CONTROL_LOOPS,)] * READS))

    def result(self) -> dict[str, Any]:
        """Return what was seen so far; times are microseconds, but in histograms nanoseconds."""
        return {
            "records": self.count,
            "microseconds": {name: each.summary() for name, each in self._histograms.items()},
            "histograms": {name: each.to_json() for name, each in self._histograms.items()},
            "longest_creates": [
                {"record": number, "microseconds": took / 1000} for took, number in self._longest
            ],
            "longest_create_of_each_row": [took / 1000 for took in self._longest_of_row],
        }


def time_each(function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> "array[int]":
    """Return the nanoseconds that each call took."""
    clock = perf_counter_ns
    took = array("Q")
    for arguments in calls:
        begin = clock()
        function(*arguments)
        took.append(clock() - begin)
    return took


def spin(count: int) -> None:
    """Keep the processor busy, and nothing else."""
    for _ in range(count):
        pass


def run_latency(
    open_engine: OpenEngine, say: Say, folder: Path, records: int, allowance: float
) -> Iterator[dict[str, Any]]:
    """Task: let a store grow in turns; yield what was seen so far."""
    store = open_engine(folder)
    try:
        watch = Watch(store)
        while watch.count < records and allowance > 0:
            say(f"has {watch.count:,} records")
            began = perf_counter()
            end = min(watch.count + TURN, records)
            while watch.count < end and allowance > perf_counter() - began:
                watch.go_on(min(CREATES, end - watch.count))
            allowance -= perf_counter() - began
            yield watch.result()
    finally:
        store.close()


def measure(plan: Plan) -> dict[str, Any]:
    """Let all stores grow; return the percentiles and histograms of each engine."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    courses = steps_in_turns(plan, run_latency, records, ALLOWANCE)
    return {
        "value_size": VALUE_SIZE,
        "ttl": TTL,
        "records": records,
        "allowance_seconds": ALLOWANCE,
        "failures": failures(courses),
        "engines": {engine: course.items[-1] for engine, course in courses.items() if course.items},
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the percentiles as a table, and where the longest creates were as another."""
    engines = result["engines"]
    columns = list(next(iter(engines.values()))["microseconds"]["create"])
    headings = ["µs an operation", *columns]
    rows = [
        [
            f"{engine}, {name}" + _how_far(result, engine),
            *(f"{seen['microseconds'][name][column]:,.1f}" for column in columns),
        ]
        for name in TIMED
        for engine, seen in engines.items()
    ]
    percentiles = markdown_table(headings, rows + failed_rows(result["failures"], len(headings)))
    longest = markdown_table(
        ["longest creates", "ms (number of the record)"],
        [
            [
                engine,
                ", ".join(
                    f"{each['microseconds'] / 1000:.2f} ({each['record']:,})"
                    for each in seen["longest_creates"][:5]
                ),
            ]
            for engine, seen in engines.items()
        ],
    )
    return f"{percentiles}\n\n{longest}"


def _how_far(result: dict[str, Any], engine: str) -> str:
    """Return in words how many records an engine got to, where they are not all."""
    count = result["engines"][engine]["records"]
    return "" if count == result["records"] else f" (to {count:,} records)"
