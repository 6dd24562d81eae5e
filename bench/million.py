"""`million`: as `operations`, in stores of a million records, and with them cold.

Each engine in each round, in a process of its own: creates all keys, then reads random ones of
them, misses as many absent ones and deletes random ones. Of values of 1,000 bytes there are
750,000, for a store of kvstore ends at 1,000,000,000 bytes. Every engine does one round, and those
that are fast enough do more, of which each gives way to the slower ones' first.
"""

import random
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from engines import OpenEngine
from operations import DISTINCT_VALUES, TTL, Micros, failure_lines, format_rows, rows_of, run_cycle
from workers import Plan, Say, Worker, noting_failure

from harness import make_keys, make_values

RECORDS: Final = {100: 1_000_000, 1000: 750_000}  # by size of value
SAMPLE: Final = 100_000  # that are read, missed and deleted
QUICK_RECORDS: Final = {100: 5000, 1000: 4000}
QUICK_SAMPLE: Final = 1000
TINY_RECORDS: Final = {100: 1000}
ROUNDS: Final = 3
ALLOWANCE: Final = 40.0  # seconds that an engine has for a size, if it has done a round
PATIENCE: Final = 150.0  # seconds that it has to create all records
LEFT_OUT: Final = "sqlite3-tuned"  # minutes, for what `operations` tells as well


def run_round(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    size: int,
    records: int,
    sample: int,
    seed: int,
    patience: float,
) -> Micros:
    """Task: do one round; return the microseconds that each operation takes."""
    say(f"{records:,} values of {size:,} bytes, round {seed + 1}")
    keys = make_keys(records)
    absent = make_keys(sample, first=records)
    values = make_values(size, DISTINCT_VALUES)
    return run_cycle(open_engine, folder, keys, absent, values, seed, patience)


class Turns:
    """Who still has time for another round of a size."""

    def __init__(self, engines: list[str], allowance: float) -> None:
        self.left = list(engines)
        self._allowance = allowance
        self._took: dict[str, list[float]] = {engine: [] for engine in engines}

    def note(self, engine: str, seconds: float) -> None:
        """A round of an engine has taken so long; the next is taken to take as long as its mean."""
        took = self._took[engine]
        took.append(seconds)
        if sum(took) * (1 + 1 / len(took)) > self._allowance:
            self.give_up(engine)

    def give_up(self, engine: str) -> None:
        """Let an engine have no other round."""
        self.left.remove(engine)


def measure(plan: Plan) -> dict[str, Any]:
    """Run the rounds; return microseconds an operation, and ratios, by size and operation."""
    sizes = TINY_RECORDS if plan.tiny else QUICK_RECORDS if plan.quick else RECORDS
    sample = QUICK_SAMPLE if plan.quick else SAMPLE
    rounds = plan.rounds or (1 if plan.quick else ROUNDS)
    rng = random.Random(2)
    failed: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for size, records in sizes.items():
        cycles: dict[str, list[Micros]] = {
            engine: [] for engine in plan.engines if engine != LEFT_OUT
        }
        turns = Turns(list(cycles), ALLOWANCE)
        for number in range(rounds):
            for engine in rng.sample(turns.left, len(turns.left)):
                begin = perf_counter()
                what = f"{engine}, {size:,} B"
                with noting_failure(failed, what), Worker(engine, plan.progress) as worker:
                    folder = plan.place / engine
                    cycles[engine].append(
                        worker.call(run_round, folder, size, records, sample, number, PATIENCE)
                    )
                if what in failed:
                    turns.give_up(engine)
                    shutil.rmtree(plan.place / engine, ignore_errors=True)
                else:
                    turns.note(engine, perf_counter() - begin)
        rows += [{"value_size": size, **row} for row in rows_of(cycles, records, 1)]
    return {"sample": sample, "ttl": TTL, "failures": failed, "rows": rows}


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table for each size of value."""
    sizes = {row["value_size"]: row["records"] for row in result["rows"]}
    tables = [
        format_rows(
            f"µs, {records:,} records of {size:,} B",
            [row for row in result["rows"] if row["value_size"] == size],
        )
        for size, records in sizes.items()
    ]
    return "\n\n".join(tables + failure_lines(result["failures"]))
