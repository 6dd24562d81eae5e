"""The time of each operation on one key, for values and stores of some sizes.

In each round each engine, in a new process and on a new file: creates all keys, reads them in
random order, reads as many absent ones, puts other values of the same size to half of the keys,
touches these, deletes the other half; of many keys only a part is worked on. One pair of clock
readings surrounds each loop; the cost of the loop itself is the same for all. Garbage collection is
on, as by default. Keys and values are made before. All sizes and engines take turns, so that ratios
of any two figures mean something. Who is fast enough does more rounds: the tables say how many.

The largest stores have as many records as a kvstore of 1 GB can hold, or a million; who is many
times slower in the smaller ones is not waited for there.
"""

import gc
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from itertools import cycle
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple

from engines import Engine, OpenEngine
from engines.own import COMPILED, IMPLEMENTATIONS, PLAIN
from records import SHAPES, TEXT, WORDS, make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, engine_table, ratio, show_spread, spread, with_failures

OPERATIONS: Final = ("create", "put", "read", "miss", "delete", "touch")
TTL: Final = 3600
ROUNDS: Final = 5
CHUNK: Final = 10_000  # creates between two looks at the clock

Micros = dict[str, float]  # that one of each operation took


class Case(NamedTuple):
    """A kind of record, and how many there are."""

    size: int
    """Of each value, in bytes of JSON."""
    records: int
    shape: str = WORDS
    share: int = 1
    """One in so many is worked on once it was created."""
    engines: tuple[str, ...] = ()
    """That alone do it, if any are named."""
    seconds: float = 9.0
    """For all rounds of an engine, beyond the first."""
    patience: float = 30.0
    """Seconds to create all records."""

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.records:,} records of {self.size:,} B, {self.shape}"


FASTEST: Final = (COMPILED, "dict", "lmdb", "tkrzw", "kyotocabinet")
_FAST: Final = (*FASTEST, PLAIN, "sqlite3", "rocksdict", "plyvel", "semidbm", "unqlite", "babeldb")
FULL: Final = (
    Case(100, 10_000, seconds=4),
    *(
        Case(size, records, shape)
        for size, records in ((100, 100_000), (1000, 100_000), (16_000, 10_000))
        for shape in SHAPES
    ),
    Case(100, 1_000_000, WORDS, 10, _FAST, seconds=25),
    Case(100, 1_000_000, TEXT, 10, FASTEST, seconds=25),
    *(Case(1000, 600_000, shape, 10, FASTEST, seconds=25) for shape in SHAPES),
    *(Case(16_000, 50_000, shape, 5, (*FASTEST, "semidbm"), seconds=25) for shape in SHAPES),
    Case(100, 3_000_000, WORDS, 30, (*IMPLEMENTATIONS,), seconds=25, patience=90),
)
QUICK: Final = tuple(each._replace(records=each.records // 100) for each in FULL)
TINY: Final = (
    Case(100, 500, share=5),
    Case(100, 400, engines=(*IMPLEMENTATIONS,)),
    *(Case(size, 20, TEXT) for size in (100, 1000, 16_000)),
)


def run_round(open_engine: OpenEngine, say: Say, folder: Path, number: int, case: Case) -> Micros:
    """Task: do one round; return the microseconds that each operation takes.

    Raises:
        TimeoutError: the creates took longer than the case has patience.
    """
    say(f"{case.name}, round {number + 1}")
    rng = random.Random(number)
    keys = make_keys(case.records)
    chosen = rng.sample(keys, case.records // case.share)
    absent = make_keys(len(chosen), first=case.records)
    wanted = rng.sample(chosen, len(chosen))
    replaced, doomed = chosen[::2], chosen[1::2]
    touched = rng.sample(replaced, len(replaced))
    values = make_values(case.size, shape=case.shape)
    others = values[1:] + values[:1]
    micros = {}
    with closing(open_engine(folder)) as store:
        gc.collect()
        micros["create"] = time_writes(store.create, keys, values, case.patience)
        gc.collect()
        micros["read"] = time_calls(store.read, wanted)
        gc.collect()
        micros["miss"] = time_misses(store, absent)
        _check_last(store, keys, values)
        gc.collect()
        micros["put"] = time_writes(store.put, replaced, others)
        _check_last(store, replaced, others)
        gc.collect()
        micros["touch"] = _time_touches(store, touched)
        gc.collect()
        micros["delete"] = time_calls(store.delete, doomed)
        time_misses(store, doomed[-1:])
    return {name: micros[name] for name in OPERATIONS}


def _check_last(store: Engine, keys: list[str], values: list[dict[str, Any]]) -> None:
    last = len(keys) - 1
    if store.read(keys[last]) != values[last % len(values)]:
        raise AssertionError("it does not hold what was stored")


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


def time_calls(function: Callable[[Any], object], keys: Collection[Any]) -> float:
    """Return the microseconds that a call for one of these takes."""
    begin = perf_counter()
    for key in keys:
        function(key)
    return (perf_counter() - begin) / len(keys) * 1e6


def _time_touches(store: Engine, keys: list[str]) -> float:
    touch = store.touch
    begin = perf_counter()
    for key in keys:
        touch(key, TTL)
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
    return measure_cases(plan, plan.pick(FULL, QUICK, TINY), plan.pick(ROUNDS, 1))


def measure_cases(plan: Plan, cases: Iterable[Case], rounds: int) -> dict[str, Any]:
    """Run all rounds of some cases; return microseconds by operation and engine of each."""
    jobs = {
        (case, engine): Job(
            engine,
            f"{engine}, {case.name},",
            (case,),
            plan.rounds or rounds,
            plan.rounds or 1,
            case.seconds,
        )
        for case in cases
        for engine in plan.engines
        if engine in case.engines or not case.engines
    }
    results, failures = rounds_in_turns(plan, run_round, jobs.values())
    rows: dict[Case, dict[str, Any]] = {}
    for (case, engine), job in jobs.items():
        row = rows.setdefault(case, {**case._asdict(), "name": case.name, "microseconds": {}})
        done = results[job.name]
        for operation in done[0] if done else ():
            micros = spread([each[operation] for each in done])
            row["microseconds"].setdefault(operation, {})[engine] = micros
    return {"ttl": TTL, "failures": failures, "cases": list(rows.values())}


def typical_case(result: Mapping[str, Any], size: int, shape: str = WORDS) -> Mapping[str, Any]:
    """Return the figures of values like this, by operation and engine: of about 100,000 records.

    It is a case that all engines do.
    """
    cases = [
        each
        for each in result["cases"]
        if (each["size"], each["shape"]) == (size, shape) and not each["engines"]
    ]
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
