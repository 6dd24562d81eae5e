"""`opening`: how long a store takes to open that was closed, and one whose process was killed.

A process loads each store and is killed by SIGKILL once its last create has returned. In each round
a copy of what that left, in the page cache and written to disk, is opened in a new process. Then
one opens the files themselves, counts what came back of what was acknowledged, creates what did
not, and closes: that store is opened in each round of the second kind.

What is timed is opening until the first read has been answered, for some engines put work off until
then. Libraries are imported, and another store has been opened, before. Opening after a kill
includes the recovery, and the flush to the disk that an engine may end it with.
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

from engines import ENGINES, Engine, OpenEngine
from files import copy_folder
from filling import Records
from workers import Plan, Say, Worker, in_turns, noting_failure, show_spread, spread

from harness import key_of, markdown_table

VALUE_SIZE: Final = 100
RECORDS: Final = 1_000_000
QUICK_RECORDS: Final = 2000
ALLOWANCE: Final = 18.0  # seconds to load a store; who does not end in it has fewer records
ROUNDS: Final = 5
ROUNDS_OF_OTHERS: Final = 2
PATIENCE: Final = 120.0

_left_open: Final[list[Engine]] = []  # in the process to be killed


def load(open_engine: OpenEngine, say: Say, directory: Path, records: int) -> int:
    """Task: create as many of the records as the time allows, and leave the store open."""
    directory.mkdir()
    store = open_engine(directory)
    _left_open.append(store)  # as garbage it might close itself
    return Records(VALUE_SIZE).fill(store, range(records), ALLOWANCE, say)


def time_opening(open_engine: OpenEngine, _say: Say, directory: Path, other: Path) -> float:
    """Task: return the seconds until a store was open and had looked for its first record."""
    _hear_no_warning()
    other.mkdir()
    open_engine(other).close()
    shutil.rmtree(other)
    begin = perf_counter()
    store = open_engine(directory)
    with suppress(KeyError):  # after a kill it may be gone
        store.read(key_of(0))
    seconds = perf_counter() - begin
    store.close()
    return seconds


def complete(open_engine: OpenEngine, say: Say, directory: Path, records: int) -> dict[str, int]:
    """Task: count the records that are there and those that are wrong; create the others; close."""
    _hear_no_warning()
    known = Records(VALUE_SIZE)
    store = open_engine(directory)
    absent, wrong = known.look(store, records, say)
    if not wrong:
        known.fill(store, absent, ALLOWANCE, say)
    store.close()
    return {"came_back": records - len(absent) - wrong, "wrong": wrong}


def _hear_no_warning() -> None:
    logging.getLogger("kvstore").addHandler(logging.NullHandler())  # it tells of each recovery


def measure(plan: Plan) -> dict[str, Any]:
    """Load all stores and kill; open them in turns; complete and close; open in turns again."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    results: dict[str, dict[str, Any]] = {
        engine: {"errors": {}, "killed": [], "closed": []}
        for engine in plan.engines
        if ENGINES[engine].keeps_a_file
    }
    for engine, result in results.items():
        with noting_failure(result["errors"], "load"), _worker(plan, engine) as worker:
            result["records"] = worker.call(load, plan.place / engine, records)
            worker.kill()
    loaded = {engine: result for engine, result in results.items() if "records" in result}
    _open_in_turns(plan, loaded, "killed")
    for engine, result in loaded.items():
        directory = plan.place / engine
        with noting_failure(result["errors"], "complete"), _worker(plan, engine) as worker:
            result.update(worker.call(complete, directory, result["records"]))
        if "complete" in result["errors"] or result["wrong"]:
            shutil.rmtree(directory)
            directory.mkdir()
            with noting_failure(result["errors"], "load again"), _worker(plan, engine) as worker:
                worker.call(complete, directory, result["records"])
    _open_in_turns(plan, loaded, "closed")
    return {"value_size": VALUE_SIZE, "records": records, "engines": results}


def _worker(plan: Plan, engine: str) -> Worker:
    return Worker(engine, plan.progress, PATIENCE)


def _open_in_turns(plan: Plan, results: dict[str, dict[str, Any]], how: str) -> None:
    """Add the seconds of opening, by rounds, under `how` the stores were left."""
    rounds = plan.rounds or (1 if plan.quick else ROUNDS)
    copy, other = plan.place / "copy", plan.place / "other"
    for number, engine in in_turns(list(results), rounds):
        few = ENGINES[engine].module != "kvstore"
        if how in results[engine]["errors"] or (few and number >= ROUNDS_OF_OTHERS):
            continue
        directory = plan.place / engine
        if how == "killed":
            copy_folder(directory, copy, flush=True)
            directory = copy
        with (
            noting_failure(results[engine]["errors"], how),
            _worker(plan, engine) as worker,
        ):
            results[engine][how].append(worker.call(time_opening, directory, other))
        for folder in (copy, other):
            shutil.rmtree(folder, ignore_errors=True)


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table, and below it what failed."""
    engines = result["engines"]
    table = markdown_table(
        [
            "engine",
            "records",
            "open after close, ms",
            "open after SIGKILL, ms",
            "µs a record",
            "came back",
            "wrong",
        ],
        [
            [
                engine,
                _number(each.get("records")),
                _milliseconds(each["closed"]),
                _milliseconds(each["killed"]),
                f"{median(each['killed']) / each['records'] * 1e6:.3g}" if each["killed"] else "–",
                _number(each.get("came_back")),
                _number(each.get("wrong")),
            ]
            for engine, each in engines.items()
        ],
    )
    failures = [
        f"- {engine}, {what}: {error}"
        for engine, each in engines.items()
        for what, error in each["errors"].items()
    ]
    return "\n".join([table, "", *failures] if failures else [table])


def _number(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _milliseconds(seconds: list[float]) -> str:
    return show_spread(spread([each * 1e3 for each in seconds])) if seconds else "–"
