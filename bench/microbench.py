"""The members of a kvstore and what they stand on, in nanoseconds, by pyperf.

What a read or a create takes beyond a call, a hash of the key and the JSON made or parsed is
kvstore's own. *Hot* is one key again and again; *cold* are all keys of a store in random order,
most of which the processor's caches do not hold. Created keys are new, and those that are deleted
were created just before. Each figure is of some processes of its own.
"""

import gc
import json
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import cycle
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, cast

import orjson
from engines import ENGINES
from records import make_keys, make_values
from workers import search_path
from xxhash import xxh3_64_intdigest

from harness import Column, Plan, engine_table, show_spread, spread, with_failures

if TYPE_CHECKING:
    from kvstore import KVStore

VALUE_SIZE: Final = 100
TTL: Final = 3600
RECORDS: Final = 100_000
CALLS: Final = 10_000  # of a hot key, and of new ones
HOT: Final = "hot"
COLD: Final = "cold"
FOUNDATIONS: Final = (
    *("a call that does nothing", "xxh3_64 of the key", "orjson.loads", "orjson.dumps"),
)
MEMBERS: Final = ("key in store", "key in store, absent", "read_bytes", "read")
CHANGES: Final = ("create", "delete")  # of cold keys only
# Of each figure: processes, values in each of them, and loops over all keys for one.
REPEATS: Final = ("--processes=3", "--values=3", "--warmups=1", "--loops=1")
FEWER: Final = ("--processes=1", "--values=1", "--warmups=0", "--loops=1")

SUBJECT: Final = "KVSTORE_BENCH_SUBJECT"  # tells pyperf's processes what `measure` wants

show_nanoseconds: Final = partial(show_spread, digits=0)

# A function, the one argument of each call, and what undoes them all.
Measure = tuple[Callable[[Any], object], Sequence[Any], Callable[[], object]]


@cache
def prepare(name: str, case: str, engine: str, records: int, folder: str) -> Measure:
    """Return what is measured under this name, with a new store in a folder."""
    store = cast("KVStore", ENGINES[engine].open(Path(folder)))
    values = make_values(VALUE_SIZE)

    def create(key: str) -> None:
        store.create(key, values[0], TTL)

    def nothing() -> None: ...

    keys, absent, new = (
        make_keys(n, place * records) for place, n in enumerate((records, records, CALLS))
    )
    for key, value in zip(keys, cycle(values)):
        store.create(key, value, TTL)
    random.Random(5).shuffle(keys)
    doomed = keys[:CALLS]
    if case == HOT:
        keys, absent, values = keys[:1] * CALLS, absent[:1] * CALLS, values[:1]
    parsed = [value for _, value in zip(keys, cycle(values))]
    texts = [orjson.dumps(values[0])] * CALLS if case == HOT else [*map(orjson.dumps, parsed)]
    measures: dict[str, Measure] = {
        "a call that does nothing": (().count, keys, nothing),
        "xxh3_64 of the key": (xxh3_64_intdigest, [key.encode() for key in keys], nothing),
        "orjson.loads": (orjson.loads, texts, nothing),
        "orjson.dumps": (orjson.dumps, parsed, nothing),
        "key in store": (store.__contains__, keys, nothing),
        "key in store, absent": (store.__contains__, absent, nothing),
        "read_bytes": (store.read_bytes, keys, nothing),
        "read": (store.read, keys, nothing),
        "create": (create, new, lambda: [*map(store.delete, new)]),
        "delete": (store.delete, doomed, lambda: [*map(create, doomed)]),
    }
    return measures[name]


def time_loops(loops: int, *subject: Any) -> float:
    """Return the seconds that a call takes, times so many loops, as pyperf expects it."""
    function, arguments, undo = prepare(*subject)
    seconds = 0.0
    for _ in range(loops):
        gc.collect()
        begin = perf_counter()
        for argument in arguments:
            function(argument)
        seconds += perf_counter() - begin
        undo()
    return seconds / len(arguments)


def main() -> None:
    """Measure one implementation, as pyperf's options say and `measure` wants it."""
    import pyperf

    names, engine, records, place = json.loads(environ[SUBJECT])
    runner = pyperf.Runner()
    for name in names:
        for case in (COLD,) if name in CHANGES else (HOT, COLD):
            with TemporaryDirectory(dir=place) as folder:
                subject = (name, case, engine, records, folder)
                runner.bench_time_func(f"{name}; {case}", time_loops, *subject)


def measure(plan: Plan) -> dict[str, Any]:
    """Have pyperf measure each implementation; return nanoseconds a call."""
    import pyperf

    records = plan.pick(RECORDS, 2000)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    failures: dict[str, str] = {}
    for engine, kind in plan.engines.items():
        if not kind.is_own:
            continue
        plan.progress.show(f"{engine}: pyperf measures")
        output = plan.place / f"{engine}.json"
        # What they stand on is the same for both.
        names = (*MEMBERS, *CHANGES) if figures else (*FOUNDATIONS, *MEMBERS, *CHANGES)
        subject = json.dumps([names, engine, records, str(plan.place)])
        changes = {**search_path(kind), **kind.environment, SUBJECT: subject}
        options = [*plan.pick(REPEATS, FEWER), f"--inherit-environ={','.join(changes)}"]
        options += plan.pick([], [], ["--in-process"])
        done = subprocess.run(
            [kind.python, __file__, f"--output={output}", *options],
            env={**environ, **changes},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failures[engine] = done.stderr.strip().splitlines()[-1]
            continue
        for bench in pyperf.BenchmarkSuite.load(str(output)):
            name, _, case = bench.get_name().partition("; ")
            nanoseconds = [seconds * 1e9 for seconds in bench.get_values()]
            figures.setdefault(name, {})[f"{engine}, {case}"] = spread(nanoseconds)
    return {"records": records, "failures": failures, "nanoseconds": figures}


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    figures = result["nanoseconds"]
    columns: list[Column] = [
        (name, show_nanoseconds, (name,))
        for name in dict.fromkeys(column for row in figures.values() for column in row)
    ]
    heading = f"ns, {result['records']:,} records of {VALUE_SIZE} B"
    return with_failures([engine_table(heading, figures, columns)], result["failures"])


if __name__ == "__main__":
    main()
