"""kvstore beside sqlite3 and py-lmdb: the time of create, read, a missed read and delete.

Each engine lives in a process of its own for the whole run. In each round each of them, in shuffled
order and never two at a time, does for each size of value on a new file: create all keys, read all
in random order, read as many absent keys, delete all in another random order. One pair of clock
readings surrounds each loop; the cost of the loop itself is the same for all. Garbage collection is
on, as by default. Keys and values are made before.

Figures are medians over the rounds, with the extremes; a ratio is the median of the ratios of the
rounds, so that what slows a whole round counts for nothing.
"""

import gc
import multiprocessing
import random
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from engines import OPENERS, Engine

from harness import (
    Progress,
    describe_machine,
    machine_line,
    make_keys,
    make_parser,
    make_values,
    markdown_table,
    save,
    scratch_directory,
)

OPERATIONS: Final = ("create", "read", "miss", "delete")
VALUE_SIZES: Final = (100, 1000)
DISTINCT_VALUES: Final = 1000


def run_worker(engine: str, records: int, ttl: int | None, pipe: Connection) -> None:
    """Do each cycle that is asked for through `pipe`: (value size, seed, folder) -> seconds."""
    keys = make_keys(records)
    absent = make_keys(records, first=records)
    values = {size: make_values(size, DISTINCT_VALUES) for size in VALUE_SIZES}
    while (order := pipe.recv()) is not None:
        size, seed, directory = order
        store = OPENERS[engine](directory)
        try:
            seconds = _run_cycle(store, keys, absent, values[size], ttl, random.Random(seed))
        finally:
            store.close()
        pipe.send(seconds)


def _run_cycle(
    store: Engine,
    keys: list[str],
    absent: list[str],
    values: list[dict[str, Any]],
    ttl: int | None,
    rng: random.Random,
) -> dict[str, float]:
    """Return the seconds that each operation took for all keys."""
    create, read, delete = store.create, store.read, store.delete
    shuffled = rng.sample(keys, len(keys))
    seconds: dict[str, float] = {}

    gc.collect()
    begin = perf_counter()
    for key, value in zip(keys, cycle(values)):
        create(key, value, ttl)
    seconds["create"] = perf_counter() - begin

    gc.collect()
    begin = perf_counter()
    for key in shuffled:
        read(key)
    seconds["read"] = perf_counter() - begin

    hits = 0
    gc.collect()
    begin = perf_counter()
    for key in absent:
        try:
            read(key)
            hits += 1
        except KeyError:
            pass
    seconds["miss"] = perf_counter() - begin

    _check_work(store, keys, values, hits)
    rng.shuffle(shuffled)
    gc.collect()
    begin = perf_counter()
    for key in shuffled:
        delete(key)
    seconds["delete"] = perf_counter() - begin
    _expect(KeyError, read, keys[0])
    _expect(KeyError, delete, keys[0])
    return seconds


def _check_work(store: Engine, keys: list[str], values: list[dict[str, Any]], hits: int) -> None:
    """See that the store has done what was timed."""
    last = len(keys) - 1
    if hits or store.read(keys[last]) != values[last % len(values)]:
        raise AssertionError(f"{type(store).__name__} does not hold what was stored")
    _expect(Exception, store.create, keys[0], values[0], None)


def _expect(kind: type[Exception], function: Callable[..., object], *arguments: object) -> None:
    try:
        function(*arguments)
    except kind:
        return
    raise AssertionError(f"{function} of {arguments[0]!r} raised nothing")


class Worker:
    """An engine in a process of its own."""

    def __init__(self, engine: str, records: int, ttl: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(
            target=run_worker, args=(engine, records, ttl, far_end), daemon=True
        )
        self._process.start()
        far_end.close()

    def run(self, size: int, seed: int, directory: Path) -> dict[str, float]:
        """Do a cycle in `directory`, made for it and removed after; return seconds by operation."""
        directory.mkdir()
        try:
            self._pipe.send((size, seed, directory))
            seconds: dict[str, float] = self._pipe.recv()
        finally:
            shutil.rmtree(directory)
        return seconds

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


Seconds = dict[int, dict[str, list[dict[str, float]]]]
"""Value size -> engine -> a dictionary of seconds by operation for each round."""


def measure(engines: list[str], records: int, rounds: int, ttl: int | None, place: Path) -> Seconds:
    """Run all rounds."""
    progress = Progress()
    progress.show("starting the workers")
    workers = {engine: Worker(engine, records, ttl) for engine in engines}
    seconds: Seconds = {size: {engine: [] for engine in engines} for size in VALUE_SIZES}
    rng = random.Random(2)
    for number in range(rounds):
        for size in VALUE_SIZES:
            for engine in rng.sample(engines, len(engines)):
                progress.show(f"round {number + 1} of {rounds}: {engine}, values of {size:,} bytes")
                seconds[size][engine].append(workers[engine].run(size, number, place / "cycle"))
    progress.clear()
    for worker in workers.values():
        worker.stop()
    return seconds


def summarize(seconds: Seconds, records: int) -> list[dict[str, Any]]:
    """Return, for each size and operation, microseconds by engine and the ratios to kvstore."""
    rows = []
    for size, by_engine in seconds.items():
        for operation in OPERATIONS:
            micros = {
                engine: [each[operation] / records * 1e6 for each in rounds]
                for engine, rounds in by_engine.items()
            }
            own = micros.get("kvstore")
            rows.append(
                {
                    "value_size": size,
                    "operation": operation,
                    "microseconds": {
                        engine: {"median": median(each), "min": min(each), "max": max(each)}
                        for engine, each in micros.items()
                    },
                    "ratio_to_kvstore": {
                        engine: median(a / b for a, b in zip(each, own, strict=True))
                        for engine, each in micros.items()
                        if own and engine != "kvstore"
                    },
                }
            )
    return rows


def format_rows(rows: list[dict[str, Any]], engines: list[str]) -> str:
    """Return the summary as a table."""
    others = list(rows[0]["ratio_to_kvstore"])
    return markdown_table(
        [
            "value",
            "operation",
            *(f"{engine}, µs" for engine in engines),
            *(f"{other} / kvstore" for other in others),
        ],
        [
            [
                f"{row['value_size']:,} B",
                row["operation"],
                *(
                    "{median:.2f} ({min:.2f}–{max:.2f})".format(**row["microseconds"][engine])
                    for engine in engines
                ),
                *(f"{row['ratio_to_kvstore'][other]:.2f}" for other in others),
            ]
            for row in rows
        ],
    )


def main() -> None:
    """Measure, print and save."""
    parser = make_parser("compare", __doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, help="keys in each cycle (default: 100,000)")
    parser.add_argument("--rounds", type=int, help="(default: 5)")
    parser.add_argument(
        "--ttl", type=int, default=3600, help="seconds for each record, 0 for none (default: 3600)"
    )
    parser.add_argument(
        "--engines",
        default="kvstore,sqlite3,sqlite3-tuned,lmdb",
        help=f"of {', '.join(OPENERS)} (default: all)",
    )
    arguments = parser.parse_args()
    records = arguments.records or (10_000 if arguments.quick else 100_000)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    engines = arguments.engines.split(",")
    if unknown := set(engines) - set(OPENERS):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}")
    if "lmdb" in engines and find_spec("lmdb") is None:
        print("lmdb is left out: it is not installed (extra `bench`)", file=sys.stderr)
        engines.remove("lmdb")

    with scratch_directory(arguments.dir) as place:
        machine = describe_machine(place, ["kvstore", "orjson", "xxhash", "portalocker", "lmdb"])
        seconds = measure(engines, records, rounds, arguments.ttl or None, place)
    rows = summarize(seconds, records)
    print(machine_line(machine))
    print(
        f"{records:,} random 20-byte keys, TTL {arguments.ttl or 'none'}; median (min–max) of "
        f"{rounds} rounds\n"
    )
    print(format_rows(rows, engines))
    save(
        "compare",
        arguments,
        {
            "machine": machine,
            "records": records,
            "rounds": rounds,
            "ttl": arguments.ttl or None,
            "summary": rows,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
