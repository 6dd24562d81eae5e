"""The time of create, read, a missed read and delete, for values and stores of some sizes.

In each round each engine, in a new process and on a new file: creates all keys, reads them in
random order, reads as many absent ones, deletes them in another random order; of many keys only a
part is read, missed and deleted. One pair of clock readings surrounds each loop; the cost of the
loop itself is the same for all. Garbage collection is on, as by default. Keys and values are made
before. All sizes and engines take turns, so that ratios of any two figures mean something. Who is
fast enough does more rounds: the tables say how many.
"""

import gc
import random
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import cycle
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

from engines import Engine, OpenEngine
from engines.own import COMPILED, IMPLEMENTATIONS
from records import TEXT, WORDS, make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, engine_table, ratio, show_spread, spread, with_failures

OPERATIONS: Final = ("create", "read", "miss", "delete")
TTL: Final = 3600
ROUNDS: Final = 5
SECONDS: Final = 9.0  # for the rounds of a case, beyond the least number of them
CHUNK: Final = 10_000  # creates between two looks at the clock

Micros = dict[str, float]  # that one of each operation took
Round = Callable[[OpenEngine, Say, Path, int, "Case"], Micros]


class Case(NamedTuple):
    """A kind of record, and how many there are."""

    size: int
    """Of each value, in bytes of JSON."""
    records: int
    shape: str = WORDS
    share: int = 1
    """One in so many is read, missed and deleted."""
    least: int = 2
    """Rounds that every engine does."""
    engines: tuple[str, ...] = ()
    """That alone do it, if any are named."""
    patience: float = 30.0
    """Seconds to create all records."""

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.records:,} records of {self.size:,} B, {self.shape}"


FULL: Final = (
    Case(100, 10_000),
    Case(100, 100_000),
    Case(100, 1_000_000, share=10, least=1),
    Case(100, 3_000_000, share=30, least=1, engines=(*IMPLEMENTATIONS,), patience=90),
    Case(1000, 100_000),
    Case(16_000, 10_000),
    Case(16_000, 10_000, TEXT),
)
QUICK: Final = tuple(each._replace(records=each.records // 100, least=1) for each in FULL)
TINY: Final = (
    Case(100, 500, share=5, least=1),
    Case(100, 400, least=1, engines=(*IMPLEMENTATIONS,)),
    Case(16_000, 20, TEXT, least=1),
)


def run_round(open_engine: OpenEngine, say: Say, folder: Path, number: int, case: Case) -> Micros:
    """Task: do one round; return the microseconds that each operation takes.

    Raises:
        TimeoutError: the creates took longer than the case has patience.
    """
    say(f"{case.name}, round {number + 1}")
    rng = random.Random(number)
    keys = make_keys(case.records)
    count = case.records // case.share
    absent = make_keys(count, first=case.records)
    wanted, doomed = rng.sample(keys, count), rng.sample(keys, count)
    values = make_values(case.size, shape=case.shape)
    micros = {}
    with closing(open_engine(folder)) as store:
        gc.collect()
        micros["create"] = time_writes(store.create, keys, values, case.patience)
        gc.collect()
        micros["read"] = time_calls(store.read, wanted)
        gc.collect()
        micros["miss"] = time_misses(store, absent)
        last = case.records - 1
        if store.read(keys[last]) != values[last % len(values)]:
            raise AssertionError("it does not hold what was stored")
        gc.collect()
        micros["delete"] = time_calls(store.delete, doomed)
        time_misses(store, doomed[-1:])
    return micros


def time_writes(
    write: Callable[[str, dict[str, Any], int | None], None],
    keys: list[str],
    values: list[dict[str, Any]],
    patience: float = inf,
) -> float:
    """Create or put these keys; return the microseconds that each took."""
    value_of = cycle(values)
    begin = perf_counter()
    for first in range(0, len(keys), CHUNK):
        if perf_counter() - begin > patience:
            raise TimeoutError(f"{first:,} of {len(keys):,} records when its time was used up")
        for key, value in zip(keys[first : first + CHUNK], value_of, strict=False):
            write(key, value, TTL)
    return (perf_counter() - begin) / len(keys) * 1e6


def time_calls(function: Callable[[str], object], keys: list[str]) -> float:
    """Return the microseconds that a call takes."""
    begin = perf_counter()
    for key in keys:
        function(key)
    return (perf_counter() - begin) / len(keys) * 1e6


def time_misses(store: Engine, keys: list[str]) -> float:
    """Return the microseconds that a read of an absent key takes, its KeyError caught."""
    read = store.read
    hits = 0
    begin = perf_counter()
    for key in keys:
        try:
            read(key)
            hits += 1
        except KeyError:
            pass
    seconds = perf_counter() - begin
    if hits:
        raise AssertionError(f"it has {hits:,} records that were never stored")
    return seconds / len(keys) * 1e6


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return the figures of each case."""
    cases, rounds = plan.pick(FULL, QUICK, TINY), plan.pick(ROUNDS, 1)
    return measure_cases(plan, run_round, cases, rounds, SECONDS)


def measure_cases(
    plan: Plan, task: Round, cases: Iterable[Case], rounds: int, seconds: float
) -> dict[str, Any]:
    """Run all rounds of some cases; return microseconds by operation and engine of each."""
    jobs = {
        (case, engine): Job(
            engine,
            f"{engine}, {case.name},",
            (case,),
            plan.rounds or rounds,
            plan.rounds or case.least,
            seconds,
        )
        for case in cases
        for engine in plan.engines
        if engine in case.engines or not case.engines
    }
    results, failures = rounds_in_turns(plan, task, jobs.values())
    rows: dict[Case, dict[str, Any]] = {}
    for (case, engine), job in jobs.items():
        row = rows.setdefault(case, {**case._asdict(), "name": case.name, "microseconds": {}})
        done = results[job.name]
        for operation in done[0] if done else ():
            micros = spread([each[operation] for each in done])
            row["microseconds"].setdefault(operation, {})[engine] = micros
    return {"ttl": TTL, "failures": failures, "cases": list(rows.values())}


def typical_case(result: Mapping[str, Any], size: int, shape: str = WORDS) -> Mapping[str, Any]:
    """Return the figures of values like this, by operation and engine: of about 100,000 records."""
    cases = [each for each in result["cases"] if (each["size"], each["shape"]) == (size, shape)]
    if not cases:
        return {}
    nearest = min(cases, key=lambda each: abs(each["records"] - 100_000))
    figures: Mapping[str, Any] = nearest["microseconds"]
    return figures


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures as a table for each case."""
    tables = [_format_case(case) for case in result["cases"] if case["microseconds"]]
    return with_failures(tables, result["failures"])


def _format_case(case: Mapping[str, Any]) -> str:
    micros = case["microseconds"]
    first, engines = next(iter(micros.items()))
    own = next(engine for engine in (COMPILED, *engines) if engine in engines)
    rows = {
        engine: {
            **{name: each[engine] for name, each in micros.items()},
            "ratio": {name: ratio(each[engine], each[own]) for name, each in micros.items()},
        }
        for engine in engines
    }
    columns: list[Column] = [
        ("rounds", str, (first, "rounds")),
        *((name, show_spread, (name,)) for name in micros),
        *((f"{name} / {own}", "{:.2f}".format, ("ratio", name)) for name in micros),
    ]
    return engine_table(f"µs, {case['name']}", rows, columns)
