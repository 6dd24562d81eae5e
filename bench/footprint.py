"""What a store takes besides time: memory, bytes of file, and how long it takes to open.

Memory is private anonymous memory, as /proc/self/smaps_rollup has it (Linux only): what the process
has written for itself. An import is measured in a new interpreter that has imported orjson, which
the same work takes with any engine; for kvstore also what it adds, with a new store open, to its
own libraries.

A process creates 1,000 records of 100 bytes, is measured, goes on to a million or as far as the
time allows, is measured again, and is killed by SIGKILL. In each round a copy of what that left, in
the page cache and written to disk, is opened in a new process. Then one opens the files themselves,
counts what came back of what was acknowledged, creates what did not, and closes: that store is
opened in each round of the second kind. Opening lasts until the first read has been answered, for
some engines put work off until then; after a kill it includes the recovery. In a kvstore of 100,000
synced records each is also put ten times, touched, deleted and put again: what is told is the most
memory that it had after any of these.

Bytes of file are what the file system has allocated for a store that was closed, opened and closed,
under keys of 20 bytes. Values are made of a few words: engines that compress them save more than
they might elsewhere.
"""

import gc
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from math import inf
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Any, Final

from engines import Engine, Kind, OpenEngine
from engines.atomic import find_extension
from records import KEY_SIZE, Records, key_of
from workers import Say, Worker, noting_failure

from harness import (
    Column,
    Plan,
    Skipped,
    engine_table,
    show_mebibytes,
    show_spread,
    spread,
    with_failures,
)

VALUE_SIZE: Final = 100
FIRST_RECORDS: Final = 1000
RECORDS: Final = 1_000_000
SECONDS: Final = (25.0, 4.0)  # that kvstore has to create them, and others, who may have fewer
ROUNDS: Final = (5, 2)  # of imports and openings of kvstore, and of openings of others
UPDATED: Final = 100_000  # records, a tenth of the puts
LARGER_VALUES: Final = {1000: 50_000, 16_000: 5000}  # size, and how many of these
OWN_LIBRARIES: Final = ("mmap", "orjson", "portalocker", "xxhash")

# The first look at the memory makes what looking takes. Arguments: libraries that are to be there,
# module, one more folder to find it in or nothing, file for a store or nothing.
_IMPORT: Final = """
import sys
from time import perf_counter
def anonymous():
    with open("/proc/self/smaps_rollup", "rb") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line[:10] == b"Anonymous:")
libraries, module, folder, path = sys.argv[1:]
for library in libraries.split():
    __import__(library)
if folder:
    sys.path.append(folder)
anonymous()
before = anonymous()
begin = perf_counter()
imported = __import__(module)
seconds = perf_counter() - begin
if path:
    store = imported.KVStore(path)
print([seconds * 1e3, anonymous() - before])
"""

Row = dict[str, Any]

show_milliseconds: Final = partial(show_spread, digits=1)

_left_open: Final[list[Engine]] = []  # in the process to be killed


def load(
    open_engine: OpenEngine, say: Say, folder: Path, records: int, seconds: float
) -> dict[str, int]:
    """Task: create records while there is time, and leave the store open; return the memory."""
    folder.mkdir()
    known = Records(VALUE_SIZE)
    store = open_engine(folder)
    _left_open.append(store)  # as garbage it might close itself
    first = known.fill(store, range(FIRST_RECORDS), seconds, say)
    early = read_anonymous()
    rest = known.fill(store, range(first, records), seconds, say)
    return {"records": first + rest, "early_bytes": early, "late_bytes": read_anonymous()}


def update(_open_engine: OpenEngine, say: Say, path: Path, records: int) -> dict[str, int]:
    """Task: put, touch and delete what a kvstore holds; return the memory before, and the most."""
    from kvstore import KVStore

    known = Records(VALUE_SIZE)
    with KVStore(path) as store:
        known.fill(store, range(FIRST_RECORDS), inf, say)
        early = late = read_anonymous()
        known.fill(store, range(FIRST_RECORDS, records), inf, say)
        store.sync()
        for operation in ("put",) * 10 + ("touch", "delete", "put"):
            say(operation)
            for index in range(records):
                if operation == "put":
                    store.put(*known.record(index))
                elif operation == "touch":
                    store.touch(key_of(index), None)
                else:
                    store.delete(key_of(index))
            late = max(late, read_anonymous())
    return {"puts": records * 11, "early_bytes": early, "late_bytes": late}


def read_anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def time_opening(open_engine: OpenEngine, _say: Say, folder: Path, other: Path) -> float:
    """Task: return the milliseconds until a store was open and had looked for its first record."""
    _ignore_warnings()
    open_engine(other).close()  # so that its libraries are there
    begin = perf_counter()
    store = open_engine(folder)
    with suppress(KeyError):  # after a kill it may be gone
        store.read(key_of(0))
    seconds = perf_counter() - begin
    store.close()
    return seconds * 1e3


def complete(open_engine: OpenEngine, say: Say, folder: Path, size: int, records: int) -> int:
    """Task: create those of so many records that are absent; return how many were there.

    Raises:
        RuntimeError: one is wrong, or cannot be read.
    """
    _ignore_warnings()
    known = Records(size)
    absent = []
    with closing(open_engine(folder)) as store:
        for index, outcome in known.outcomes(store, range(records)):
            if outcome == "absent":
                absent.append(index)
            elif outcome != "right":
                raise RuntimeError(f"record {index:,} is not right: {outcome}")
        known.fill(store, absent, inf, say)
    open_engine(folder).close()  # some tidy up only then
    return records - len(absent)


def _ignore_warnings() -> None:
    logging.getLogger("kvstore").addHandler(logging.NullHandler())  # it tells of each recovery


def measure(plan: Plan) -> dict[str, Any]:
    """Import, load, kill, open, complete, open again; then store larger values.

    Raises:
        Skipped: this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise Skipped("/proc/self/smaps_rollup is Linux's")
    failures: dict[str, str] = {}
    rows = _measure_imports(plan)
    records = plan.pick(RECORDS, 20_000, 2000)
    for engine, row in rows.items():
        with noting_failure(failures, f"{engine}, loading,"), Worker(plan, engine) as worker:
            seconds = SECONDS[not plan.engines[engine].is_own]
            row.update(worker.call(load, plan.place / engine, records, seconds))
            worker.kill()
        if plan.engines[engine].is_own:
            what = f"{engine}, updating,"
            with noting_failure(failures, what), Worker(plan, engine) as worker:
                path = plan.place / "updated.kvs"
                row["updated"] = worker.call(update, path, plan.pick(UPDATED, 2000))
                path.unlink()
    files = {engine: rows[engine] for engine in plan.with_file() if "records" in rows[engine]}
    _open_in_turns(plan, files, "killed", failures)
    for engine, row in files.items():
        folder = plan.place / engine
        with noting_failure(failures, f"{engine}, completing,"), Worker(plan, engine) as worker:
            row["came_back"] = worker.call(complete, folder, VALUE_SIZE, row["records"])
            row["bytes_per_record"] = {VALUE_SIZE: allocated(folder) / row["records"]}
    files = {engine: row for engine, row in files.items() if "came_back" in row}
    _open_in_turns(plan, files, "closed", failures)
    for engine, row in files.items():
        rmtree(plan.place / engine)
        for size, wanted in plan.pick(LARGER_VALUES, {1000: 500}).items():
            folder = plan.place / f"{engine}-{size}"
            folder.mkdir()
            with noting_failure(failures, f"{engine}, {size:,} B,"), Worker(plan, engine) as worker:
                worker.call(complete, folder, size, wanted)
                row["bytes_per_record"][size] = allocated(folder) / wanted
            rmtree(folder)
    return {
        "value_size": VALUE_SIZE,
        "first_records": FIRST_RECORDS,
        "records": records,
        "engines": rows,
        "failures": failures,
    }


def _measure_imports(plan: Plan) -> dict[str, Row]:
    """Return what importing each engine adds to orjson, and each kvstore to its libraries."""
    figures: dict[str, list[list[float]]] = {engine: [] for engine in plan.engines}
    opened: dict[str, list[list[float]]] = {}
    store = plan.place / "new"
    rng = random.Random(2)
    for _ in range(1 + (plan.rounds or plan.pick(ROUNDS[0], 1))):
        for engine in rng.sample(list(figures), len(figures)):
            plan.progress.show(f"{engine}: importing")
            kind = plan.engines[engine]
            figures[engine].append(_import(plan, kind, "orjson", ""))
            if kind.is_own:
                beyond = _import(plan, kind, " ".join(OWN_LIBRARIES), str(store))
                opened.setdefault(engine, []).append(beyond)
                store.unlink()
    rows: dict[str, Row] = {engine: {} for engine in figures}
    for names, found in (
        (("import_milliseconds", "import_bytes"), figures),
        (("beyond_milliseconds", "opened_bytes"), opened),
    ):
        for engine, rounds in found.items():
            # The first round compiles the modules, which takes time and memory.
            for name, column in zip(names, zip(*rounds[1:], strict=True), strict=True):
                rows[engine][name] = spread(column)
    return rows


def _import(plan: Plan, kind: Kind, libraries: str, store: str) -> list[float]:
    """Return the milliseconds and bytes that an import takes."""
    # Where a module is not to be found by its name alone.
    spec = kind.find(kind.module) if kind.find is find_extension else None
    folder = str(Path(spec.origin).parent) if spec is not None and spec.origin else ""
    done = subprocess.run(
        [kind.python, "-P", "-c", _IMPORT, libraries, kind.module, folder, store],
        stdout=subprocess.PIPE,
        check=True,
        env={
            **os.environ,
            **kind.environment,
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(plan.place / "compiled"),
        },
    )
    figures: list[float] = json.loads(done.stdout)
    return figures


def _open_in_turns(plan: Plan, rows: Mapping[str, Row], how: str, failures: dict[str, str]) -> None:
    """Add the milliseconds of opening, in some rounds, under `how` the stores were left."""
    copy, other = plan.place / "copy", plan.place / "other"
    figures: dict[str, list[float]] = {engine: [] for engine in rows}
    rng = random.Random(2)
    for number in range(plan.rounds or plan.pick(ROUNDS[0], 1)):
        for engine in rng.sample(list(figures), len(figures)):
            what = f"{engine}, opening when {how},"
            is_few = not plan.engines[engine].is_own and number >= ROUNDS[1]
            if is_few or what in failures:
                continue
            folder = plan.place / engine
            if how == "killed":
                copy_folder(folder, copy)
                os.sync()
                folder = copy
            other.mkdir()
            with noting_failure(failures, what), Worker(plan, engine) as worker:
                figures[engine].append(worker.call(time_opening, folder, other))
            for each in (copy, other):
                rmtree(each, ignore_errors=True)
    for engine, milliseconds in figures.items():
        if milliseconds:
            rows[engine][how] = spread(milliseconds)


def allocated(folder: Path) -> int:
    """Return the bytes that the file system has set aside for the files in a folder."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def copy_folder(source: Path, target: Path) -> None:
    """Copy all files, holes as holes: one of LMDB is gigabytes of these."""
    subprocess.run(["cp", "-r", "--sparse=always", source, target], check=True)


def format_result(result: Mapping[str, Any]) -> str:
    """Return the figures as tables: memory, opening, space."""
    rows = result["engines"]
    files = {engine: row for engine, row in rows.items() if "bytes_per_record" in row}
    number: Callable[[float], str] = "{:,}".format
    memory: list[Column] = [
        ("import, beyond orjson", show_mebibytes, ("import_bytes", "median")),
        ("ms for it", show_milliseconds, ("import_milliseconds",)),
        (
            f"with a store open, beyond {', '.join(OWN_LIBRARIES)}",
            show_mebibytes,
            ("opened_bytes", "median"),
        ),
        (f"with {result['first_records']:,} records", show_mebibytes, ("early_bytes",)),
        ("with more", show_mebibytes, ("late_bytes",)),
        ("records then", number, ("records",)),
        ("with all updated", show_mebibytes, ("updated", "late_bytes")),
    ]
    opening: list[Column] = [
        ("after close", show_milliseconds, ("closed",)),
        ("after SIGKILL", show_milliseconds, ("killed",)),
        ("records", number, ("records",)),
        ("came back", number, ("came_back",)),
    ]
    space: list[Column] = [
        (f"{size:,} B", "{:,.0f}".format, ("bytes_per_record", f"{size}"))
        for size in (VALUE_SIZE, *LARGER_VALUES)
    ]
    tables = [
        engine_table("private memory, MiB", rows, memory),
        engine_table("opening, ms", files, opening),
        engine_table(f"bytes a record, beside {KEY_SIZE} B of key", files, space),
    ]
    return with_failures(tables, result["failures"])
