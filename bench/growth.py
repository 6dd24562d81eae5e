"""`growth`: what an operation costs in a store of 10,000 to 3,000,000 records of 100 bytes.

For each size the store of each engine, in turns, grows to it; then random records are read, absent
ones missed, as many created and as many random ones deleted, so that its size stays. Two figures
tell of creates: `grow`, the mean over all that it took to get there, with every split, rewrite and
compaction; and `create`, at that size.

What an engine's own cost at a size is beside that at 100,000 records is not told from figures taken
minutes apart: the speed of the machine drifts. A second store of 100,000 records, made anew at each
size, is measured alternately with the large one, round by round.
"""

import gc
import random
import shutil
from array import array
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from engines import OpenEngine
from workers import Plan, Say, failed_rows, failures, spread, steps_in_turns

from harness import key_of, make_values, markdown_table

SAMPLED: Final = ("read", "miss", "create", "delete")
OPERATIONS: Final = ("grow", *SAMPLED)
VALUE_SIZE: Final = 100
DISTINCT_VALUES: Final = 1000
TTL: Final = 3600
SIZES: Final = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
BASE: Final = 100_000  # records of the second store
QUICK_SIZES: Final = (1000, 3000, 10_000)
QUICK_BASE: Final = 3000
ROUNDS: Final = 21
QUICK_ROUNDS: Final = 3
SAMPLE: Final = 1000  # of each operation in a round
QUICK_SAMPLE: Final = 100
ALLOWANCE: Final = 120.0  # seconds that an engine has for all of it
CHUNK: Final = 10_000  # keys made at a time
PART: Final = 1_000_000  # records created in one turn

# The figures of one store: microseconds of each operation, one for each round.
Figures = dict[str, list[float]]


class GrowingStore:
    """A store whose keys are those of growing numbers, some of which were deleted again."""

    def __init__(self, open_engine: OpenEngine, folder: Path, rng: random.Random) -> None:
        folder.mkdir()
        self._folder = folder
        self._store = open_engine(folder)
        self._rng = rng
        self._values = make_values(VALUE_SIZE, DISTINCT_VALUES)
        self._present = array("L")  # numbers of the keys
        self._next = 0
        self._pace = 0.0  # seconds a record, when it last grew

    def __len__(self) -> int:
        return len(self._present)

    def grow(self, size: int, seconds_left: float) -> float:
        """Create records until there are `size`; return the microseconds that each took.

        Raises:
            TimeoutError: it took longer than it may.
        """
        began, count = perf_counter(), size - len(self)
        seconds = 0.0
        while len(self) < size:
            if perf_counter() - began > seconds_left:
                raise TimeoutError(f"{len(self):,} records when its time was used up")
            numbers = self._take_numbers(min(CHUNK, size - len(self)))
            seconds += self._time_creates(numbers)
            self._present.extend(numbers)
        self._pace = (perf_counter() - began) / count
        return seconds / count * 1e6

    def check_time(self, size: int, seconds_left: float) -> None:
        """Raise TimeoutError where growing to `size`, at the pace it had, will take longer."""
        if self._pace * (size - len(self)) > seconds_left:
            raise TimeoutError(f"{len(self):,} records, for {size:,} its time would not do")

    def sample(self, count: int) -> dict[str, float]:
        """Do `count` of each operation; return the microseconds that each took. The size stays."""
        records = range(len(self))
        read, delete = self._store.read, self._store.delete
        wanted = [key_of(self._present[place]) for place in self._rng.sample(records, count)]
        absent = [key_of(number) for number in range(1 << 40, (1 << 40) + count)]
        places = self._rng.sample(records, count)
        doomed = [key_of(self._present[place]) for place in places]
        seconds: dict[str, float] = {}

        begin = perf_counter()
        for key in wanted:
            read(key)
        seconds["read"] = perf_counter() - begin

        hits = 0
        begin = perf_counter()
        for key in absent:
            try:
                read(key)
                hits += 1
            except KeyError:
                pass
        seconds["miss"] = perf_counter() - begin
        if hits:
            raise AssertionError(f"{type(self._store).__name__} has {hits} records of nobody")

        fresh = self._take_numbers(count)
        seconds["create"] = self._time_creates(fresh)

        begin = perf_counter()
        for key in doomed:
            delete(key)
        seconds["delete"] = perf_counter() - begin
        for place, number in zip(places, fresh, strict=True):
            self._present[place] = number
        return {operation: each / count * 1e6 for operation, each in seconds.items()}

    def close(self) -> None:
        """Close the store, and remove its file."""
        self._store.close()
        shutil.rmtree(self._folder)

    def _take_numbers(self, count: int) -> range:
        self._next += count
        return range(self._next - count, self._next)

    def _time_creates(self, numbers: range) -> float:
        create = self._store.create
        keys = [key_of(number) for number in numbers]
        values = list(islice(cycle(self._values), len(keys)))
        begin = perf_counter()
        for key, value in zip(keys, values, strict=True):
            create(key, value, TTL)
        return perf_counter() - begin


def run_growth(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    sizes: Sequence[int],
    base: int,
    sample: int,
    rounds: int,
    allowance: float,
) -> Iterator[dict[str, Any]]:
    """Task: grow a store in turns; yield the figures of a size when it is there, else nothing."""
    rng = random.Random(1)
    large = GrowingStore(open_engine, folder / "large", rng)
    try:
        for size in sizes:
            grown: Figures = {"large": [], "small": []}
            while len(large) < size:
                began = perf_counter()
                figures: dict[str, Any] = {}
                small = None
                try:
                    large.check_time(size, allowance)
                    if size > base:
                        say(f"makes a store of {base:,} records")
                        small = GrowingStore(open_engine, folder / "small", rng)
                        small.grow(base // 3, allowance)
                        grown["small"].append(small.grow(base, allowance))
                    say(f"grows from {len(large):,} to {size:,} records")
                    left = allowance - (perf_counter() - began)
                    grown["large"].append(large.grow(min(size, len(large) + PART), left))
                    if len(large) == size:
                        say(f"samples {size:,} records")
                        figures = sample_both(large, small, sample, rounds)
                        for name, micros in grown.items():
                            figures[name]["grow"] = micros
                except TimeoutError as error:
                    figures = {"stopped": str(error)}
                finally:
                    if small is not None:
                        small.close()
                allowance -= perf_counter() - began
                yield figures
                if "stopped" in figures:
                    return
    finally:
        large.close()


def sample_both(
    large: GrowingStore, small: GrowingStore | None, sample: int, rounds: int
) -> dict[str, Figures]:
    """Return the figures of both stores, measured alternately; none of a small one that is not."""
    stores = {"large": large} if small is None else {"large": large, "small": small}
    figures: dict[str, Figures] = {"large": {}, "small": {}}
    gc.collect()
    for number in range(rounds):
        # Each goes first as often as the other.
        for name in sorted(stores, reverse=number % 2 == 1):
            for operation, micros in stores[name].sample(sample).items():
                figures[name].setdefault(operation, []).append(micros)
    return figures


def own_cost(large: Figures, small: Figures) -> dict[str, float]:
    """Return for each operation how many times what it costs in a small store it does in a large.

    The ratio of the medians of the rounds. `grow` is a mean over parts, of one length in a store.
    """
    return {
        operation: _typical(operation, large) / _typical(operation, small)
        for operation in OPERATIONS
        if small.get(operation)
    }


def _typical(operation: str, figures: Figures) -> float:
    rounds = figures[operation]
    return sum(rounds) / len(rounds) if operation == "grow" else median(rounds)


def measure(plan: Plan) -> dict[str, Any]:
    """Let all stores grow; return the figures of each engine at each size."""
    sizes = QUICK_SIZES if plan.quick else SIZES
    base = QUICK_BASE if plan.quick else BASE
    courses = steps_in_turns(
        plan,
        run_growth,
        sizes,
        base,
        QUICK_SAMPLE if plan.quick else SAMPLE,
        plan.rounds or (QUICK_ROUNDS if plan.quick else ROUNDS),
        ALLOWANCE,
    )
    stopped = {
        engine: item["stopped"]
        for engine, course in courses.items()
        for item in course.items
        if "stopped" in item
    }
    rows = []
    for engine, course in courses.items():
        sampled = [item for item in course.items if "large" in item]
        for size, item in zip(sizes, sampled, strict=False):
            large, small = item["large"], item["small"]
            rows.append(
                {
                    "engine": engine,
                    "records": size,
                    "microseconds": {each: spread(large[each]) for each in OPERATIONS},
                    "microseconds_of_second_store": {
                        each: spread(small[each]) for each in OPERATIONS if small.get(each)
                    },
                    "own_cost": own_cost(large, small),
                }
            )
    return {
        "value_size": VALUE_SIZE,
        "ttl": TTL,
        "base": base,
        "allowance_seconds": ALLOWANCE,
        "failures": stopped | failures(courses),
        "rows": rows,
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table of costs, and one of own costs at the largest size reached."""
    headings = ["µs an operation", *OPERATIONS]
    rows = [
        [
            f"{row['engine']}, {row['records']:,} records",
            *(f"{row['microseconds'][each]['median']:.2f}" for each in OPERATIONS),
        ]
        for row in result["rows"]
    ]
    costs = markdown_table(headings, rows + failed_rows(result["failures"], len(headings)))
    largest = {row["engine"]: row for row in result["rows"] if row["own_cost"]}
    ratios = markdown_table(
        [f"own cost, beside that at {result['base']:,} records", *OPERATIONS],
        [
            [
                f"{engine}, {row['records']:,} records",
                *(f"{row['own_cost'][each]:.2f}" for each in OPERATIONS),
            ]
            for engine, row in largest.items()
        ],
    )
    return f"{costs}\n\n{ratios}"
