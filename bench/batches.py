"""Many keys in one call beside a call for each.

In each round each engine that has both, in a new process: a store grows to a million records or as
far as the time allows, by batches and by creates in turns. Then keys of all of it, chosen by
chance, so that the processor's caches hold few of them, are read, and others deleted, by batches
and one by one in turns. At last a durable store gets batches and single puts in turns. What an
engine has for one kind of batch only is a loop for the others: that takes as long as single calls.

Of kvstore also `read_bytes` is timed, and what parsing takes of a batch of reads.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, Final, cast

import orjson
from engines import BatchEngine, OpenEngine
from operations import TTL, time_calls, time_writes
from records import key_of, make_keys, make_values
from workers import Job, Say, rounds_in_turns

from harness import Column, Plan, Skipped, engine_table, ratio, show_spread, spread, with_failures

VALUE_SIZE: Final = 100
RECORDS: Final = 1_000_000
PATIENCE: Final = (30.0, 4.0)  # seconds that kvstore has to grow, and another engine
NEW: Final = 1000  # records of a batch that grows the store
COLD: Final = 64  # keys of a batch of reads or deletes
TURNS: Final = 1000  # of them
DURABLE: Final = 100  # records of a durable batch
FEW: Final = 10  # single puts after it
DURABLE_SECONDS: Final = 0.5
ROUNDS: Final = 5
SECONDS: Final = (25.0, 12.0)  # for all rounds of kvstore, and of another, beyond the first

# What is compared: a batch, and what does the same one by one.
PAIRS: Final = (
    ("put_many", "create"),
    ("get_many", "read"),
    ("delete_many", "delete"),
    ("put_many, durable", "put, durable"),
)
LOOKUP: Final = ("get_many, unparsed", "read_bytes")  # of kvstore

Took = dict[str, list[float]]  # microseconds a key that each turn of each kind of call took


def run_round(
    open_engine: OpenEngine,
    say: Say,
    folder: Path,
    number: int,
    records: int,
    turns: int,
    seconds: tuple[float, float | None],
) -> tuple[int, dict[str, float]]:
    """Task: return how far the store grew, and the microseconds a key.

    In `seconds` it grows, and a durable one is written, if that can be.
    """
    say(f"round {number + 1}")
    took: Took = defaultdict(list)
    rng = random.Random(number)
    to_grow, durable = seconds
    with closing(cast("BatchEngine", open_engine(folder))) as store:
        grown = _grow(took, store, records, to_grow)
        _read(took, store, rng, grown, turns)
        _delete(took, store, rng, grown, turns)
    if durable is not None:
        (folder / "durable").mkdir()
        with closing(cast("BatchEngine", open_engine(folder / "durable", durable=True))) as store:
            _put_durably(took, store, durable)
    return grown, {name: fmean(each) for name, each in took.items()}


def time_batch(function: Callable[[Any], object], keys: Collection[str]) -> float:
    """Return the microseconds a key that one call for all of them takes."""
    begin = perf_counter()
    function(keys)
    return (perf_counter() - begin) / len(keys) * 1e6


def _grow(took: Took, store: BatchEngine, records: int, seconds: float) -> int:
    """Store new records, in batches and by single calls in turns; return how many."""
    values = make_values(VALUE_SIZE)
    put_many = partial(store.put_many, ttl=TTL)
    end = perf_counter() + seconds
    first = 0
    while first < records and (perf_counter() < end or not first):
        batch = dict(zip(make_keys(NEW, first), cycle(values), strict=False))
        took["put_many"].append(time_batch(put_many, batch))
        keys = make_keys(NEW, first + NEW)
        took["create"].append(time_writes(store.create, keys, values))
        first += 2 * NEW
    return first


def _read(took: Took, store: BatchEngine, rng: random.Random, records: int, turns: int) -> None:
    """Read keys chosen by chance, in batches and by single calls in turns."""

    def chosen() -> list[str]:
        return [key_of(rng.randrange(records)) for _ in range(COLD)]

    values = cycle(map(orjson.dumps, make_values(VALUE_SIZE)))
    single: dict[str, Callable[[str], object]] = {"read": store.read}
    if read_bytes := getattr(store, "read_bytes", None):
        single["read_bytes"] = read_bytes
    for _ in range(turns):
        took["get_many"].append(time_batch(store.get_many, chosen()))
        took["orjson.loads"].append(time_calls(orjson.loads, list(islice(values, COLD))))
        for name, read in single.items():
            took[name].append(time_calls(read, chosen()))
    keys = chosen()
    if set(store.get_many(keys)) != set(keys):
        raise AssertionError("it does not hold what was stored")


def _delete(took: Took, store: BatchEngine, rng: random.Random, records: int, turns: int) -> None:
    """Delete keys chosen by chance, in batches and by single calls in turns."""
    doomed = [key_of(index) for index in rng.sample(range(records), 2 * COLD * turns)]
    for first in range(0, len(doomed), 2 * COLD):
        keys = doomed[first : first + 2 * COLD]
        took["delete_many"].append(time_batch(store.delete_many, keys[:COLD]))
        took["delete"].append(time_calls(store.delete, keys[COLD:]))
    if store.get_many(doomed[: 2 * COLD]):
        raise AssertionError("it holds what was deleted")


def _put_durably(took: Took, store: BatchEngine, seconds: float) -> None:
    """Put new records that are to be on stable storage, in batches and by single calls in turns."""
    values = make_values(VALUE_SIZE)
    put_many = partial(store.put_many, ttl=TTL)
    end = perf_counter() + seconds
    first = 0
    while perf_counter() < end or not first:
        keys = make_keys(DURABLE + FEW, first)
        batch = dict(zip(keys[:DURABLE], values, strict=False))
        took["put_many, durable"].append(time_batch(put_many, batch))
        took["put, durable"].append(time_writes(store.put, keys[DURABLE:], values))
        first += len(keys)


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return microseconds a key, by engine and kind of call.

    Raises:
        Skipped: kvstore has no batches.
    """
    from kvstore import KVStore

    if not hasattr(KVStore, "get_many"):
        raise Skipped("this kvstore has no get_many, put_many and delete_many")
    records, turns = plan.pick((RECORDS, TURNS), (20_000, 50), (2000, 4))
    durable = plan.pick(DURABLE_SECONDS, 0.05, 0.02)
    rounds = plan.rounds or plan.pick(ROUNDS, 1)
    jobs = []
    for engine, kind in plan.engines.items():
        to_grow, seconds = PATIENCE[not kind.is_own], SECONDS[not kind.is_own]
        if kind.has_batches:
            arguments = (records, turns, (to_grow, durable if kind.can_be_durable else None))
            jobs.append(Job(engine, engine, arguments, rounds, seconds=seconds))
    results, failures = rounds_in_turns(plan, run_round, jobs)
    return {
        "value_size": VALUE_SIZE,
        "failures": failures,
        "engines": {engine: summarise(done) for engine, done in results.items() if done},
    }


def summarise(rounds: list[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    """Return the figures of an engine: microseconds a key, and how many times as fast batches are.

    An unparsed batch is one less what parsing its values takes.
    """
    of_rounds = [dict(micros) for _, micros in rounds]
    if "read_bytes" in of_rounds[0]:
        for micros in of_rounds:
            micros[LOOKUP[0]] = micros["get_many"] - micros["orjson.loads"]
    figures = {name: spread([each[name] for each in of_rounds]) for name in of_rounds[0]}
    del figures["orjson.loads"]
    return {
        "records": min(records for records, _ in rounds),
        "microseconds": figures,
        "times": {
            batch: ratio(figures[single], figures[batch])
            for batch, single in (*PAIRS, LOOKUP)
            if batch in figures
        },
    }


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    columns: list[Column] = [("rounds", str, ("microseconds", "read", "rounds"))]
    for batch, single in (*PAIRS, LOOKUP):
        columns += [(name, show_spread, ("microseconds", name)) for name in (single, batch)]
        columns.append((f"{single} / {batch}", "{:.2f}".format, ("times", batch)))
    columns.append(("records", "{:,}".format, ("records",)))
    return with_failures([engine_table("µs a key", result["engines"], columns)], result["failures"])
