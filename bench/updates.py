"""The time of put and touch, beside the stores that come nearest and those most used.

In each round each engine, in a new process and on a new file that holds all keys: puts other values
of the same size to live keys in random order, and touches live keys in another. Then new keys are
created and put, a few at a time in turns, so that what these two take can be compared closely.
Where an engine has no touch of its own, it gets the record and sets it again, parsing nothing. Of
many keys only a part is updated. SQLite and diskcache, many times slower, are not waited for where
there are most. The larger stores of 1,000 B have no more records than a kvstore can hold.
"""

import gc
import random
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from engines import Engine, OpenEngine
from engines.own import COMPILED, IMPLEMENTATIONS
from operations import TTL, Case, Micros, format_result, measure_cases, time_writes
from records import TEXT, WORDS, make_keys, make_values
from workers import Say

from harness import Plan

__all__ = ["format_result", "measure", "run_round"]  # the tables are those of `operations`

OPERATIONS: Final = ("put", "touch")  # of live keys
NEW: Final = ("create, new", "put, new")
ROUNDS: Final = 5
SECONDS: Final = 9.0  # for the rounds of a case, beyond the least number of them
TURNS: Final = 100  # of creates and puts of new keys

PEERS: Final = ("lmdb", "tkrzw", "kyotocabinet", "sqlite3", "diskcache")

_FASTEST: Final = (COMPILED, "dict", "lmdb", "tkrzw", "kyotocabinet")
_ALL: Final = (*IMPLEMENTATIONS, "dict", *PEERS)
_SHAPES: Final = (WORDS, TEXT)

FULL: Final = (
    *(Case(n, 100_000, shape, share=2, engines=_ALL) for n in (100, 1000) for shape in _SHAPES),
    *(
        Case(size, records, shape, share=10, engines=_FASTEST)
        for size, records in ((100, 1_000_000), (1000, 600_000))
        for shape in _SHAPES
    ),
    Case(16_000, 10_000, engines=_ALL),
)
QUICK: Final = tuple(each._replace(records=each.records // 100, least=1) for each in FULL)
TINY: Final = (Case(100, 500, engines=_ALL, least=1),)


def run_round(open_engine: OpenEngine, say: Say, folder: Path, number: int, case: Case) -> Micros:
    """Task: do one round; return the microseconds that each operation takes.

    Raises:
        TimeoutError: creating all keys took longer than the case has patience.
    """
    say(f"{case.name}, round {number + 1}")
    rng = random.Random(number)
    keys = make_keys(case.records)
    count = case.records // case.share
    new = make_keys(count, first=case.records)
    replaced, touched = rng.sample(keys, count), rng.sample(keys, count)
    values = make_values(case.size, shape=case.shape)
    others = values[1:] + values[:1]
    micros = {}
    with closing(open_engine(folder)) as store:
        time_writes(store.create, keys, values, case.patience)
        gc.collect()
        micros["put"] = time_writes(store.put, replaced, others)
        gc.collect()
        micros["touch"] = _time_touches(store, touched)
        last = count - 1
        if store.read(replaced[last]) != others[last % len(others)]:
            raise AssertionError("it does not hold what was put")
        micros.update(_time_new(store, new, values))
    return micros


def _time_touches(store: Engine, keys: list[str]) -> float:
    touch = store.touch
    begin = perf_counter()
    for key in keys:
        touch(key, TTL)
    return (perf_counter() - begin) / len(keys) * 1e6


def _time_new(store: Engine, keys: list[str], values: list[dict[str, Any]]) -> Micros:
    """Create and put new keys in turns; return the microseconds that each took."""
    gc.collect()
    step = max(len(keys) // TURNS, 1)
    writes = dict(zip(NEW, (store.create, store.put), strict=True))
    took: dict[str, list[float]] = {name: [] for name in NEW}
    for turn, first in enumerate(range(0, len(keys) - step + 1, step)):
        name = NEW[(turn + 1) // 2 % 2]  # each comes first as often
        took[name].append(time_writes(writes[name], keys[first : first + step], values))
    return {name: sum(each) / len(each) for name, each in took.items()}


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return the figures of each case."""
    cases, rounds = plan.pick(FULL, QUICK, TINY), plan.pick(ROUNDS, 1)
    return measure_cases(plan, run_round, cases, rounds, SECONDS)
