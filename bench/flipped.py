"""What a store does where one byte of its files is not what it wrote.

In each trial a closed store is copied and one byte of the copy, of those that are not zero, is
changed to another by chance. A process opens it and reads everything.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

from engines import OpenEngine
from files import copy_folder, data_ranges
from filling import Records
from outcomes import (
    ABSENT,
    RIGHT,
    WRONG,
    Outcomes,
    count_reads,
    how_it_ended,
    name_of,
    prepare_for_harm,
)
from workers import Plan, Say, Worker, WorkerError

from harness import key_of, markdown_table

VALUE_SIZE: Final = 200
RECORDS: Final = 5000
QUICK_RECORDS: Final = 500
TRIALS: Final = 100
QUICK_TRIALS: Final = 3
TTL: Final = 1_000_000
PATIENCE: Final = 20.0  # seconds that a trial may take
# What may come of a trial, the worst last; and its heading.
VERDICTS: Final = {
    "all right": "no harm",
    "errors": "errors for some keys",
    "not opened": "error on opening",
    "hangs": "hangs",
    "dies": "process dies",
    "absent": "keys lost without a word",
    "wrong": "wrong values",
}


# --- in the process of the engine ----------------------------------------------------------------


def make_store(open_engine: OpenEngine, _say: Say, folder: Path, records: int) -> None:
    """Task: leave a store of some records, closed twice: for some tidy up when they are opened."""
    known = Records(VALUE_SIZE)
    store = open_engine(folder)
    for index in range(records):
        store.create(key_of(index), known.value(index), TTL)
    store.close()
    open_engine(folder).close()


def read_all(open_engine: OpenEngine, _say: Say, folder: Path, records: int) -> Outcomes:
    """Task: open the store and read all records."""
    prepare_for_harm()
    try:
        store = open_engine(folder)
    except Exception as error:
        return {f"not opened: {name_of(error)}": 1}
    outcomes = count_reads(store, Records(VALUE_SIZE), range(records))
    try:
        store.close()
    except Exception as error:
        outcomes[f"closing: {name_of(error)}"] = 1
    return outcomes


# --- in the parent -------------------------------------------------------------------------------


def measure_flips(plan: Plan, engines: list[str]) -> dict[str, Any]:
    """Return how many trials ended how, by engine, and how many records were hit how."""
    records = QUICK_RECORDS if plan.quick else RECORDS
    trials = QUICK_TRIALS if plan.quick else TRIALS
    return {
        "value_size": VALUE_SIZE,
        "records": records,
        "trials": trials,
        "engines": {engine: _try_engine(plan, engine, records, trials) for engine in engines},
    }


def _try_engine(plan: Plan, engine: str, records: int, trials: int) -> dict[str, Any]:
    """Return how often each of `VERDICTS` was reached, and what came of all reads."""
    verdicts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    whole = plan.place / engine
    whole.mkdir()
    rng = random.Random(6)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(engine, plan.progress, PATIENCE))
        worker.call(make_store, whole, records)
        for number in range(trials):
            plan.progress.show(f"{engine}: byte {number + 1} of {trials}")
            # A name of its own: a store that could not be opened may be held open all the same.
            copy = plan.place / f"{engine}-{number}"
            copy_folder(whole, copy, flush=False)
            flip_byte(copy, rng)
            try:
                seen = worker.call(read_all, copy, records)
            except WorkerError as error:
                seen = {how_it_ended(error): 1}
                worker.kill()
                worker = stack.enter_context(Worker(engine, plan.progress, PATIENCE))
            verdicts[verdict_of(seen)] += 1
            outcomes.update(seen)
            rmtree(copy)
    rmtree(whole)
    return {"verdicts": dict(verdicts), "outcomes": dict(outcomes)}


def flip_byte(folder: Path, rng: random.Random) -> None:
    """Change one byte, of those that are not zero, in the files of a folder."""
    parts = [
        (path, start, end) for path in sorted(folder.rglob("*")) for start, end in _parts_of(path)
    ]
    sizes = [end - start for _, start, end in parts]
    while True:
        ((path, start, end),) = rng.choices(parts, sizes)
        with path.open("r+b") as file:
            offset = rng.randrange(start, end)
            file.seek(offset)
            if before := file.read(1)[0]:
                file.seek(offset)
                file.write(bytes([before ^ rng.randrange(1, 256)]))
                return


def _parts_of(path: Path) -> Iterator[tuple[int, int]]:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield from data_ranges(descriptor)
        finally:
            os.close(descriptor)


def verdict_of(seen: Outcomes) -> str:
    """Return which of `VERDICTS` a trial ends with."""
    if WRONG in seen:
        return "wrong"
    if ABSENT in seen:
        return "absent"
    if set(seen) == {RIGHT}:
        return "all right"
    for what in seen:
        if what.startswith("dies"):
            return "dies"
        if what.startswith("no sign of life"):
            return "hangs"
        if what.startswith("not opened"):
            return "not opened"
    return "errors"


def format_flips(result: dict[str, Any]) -> str:
    """Return how the trials ended, and what came of reads that were not right, as a table."""
    return markdown_table(
        [
            f"{result['trials']} trials, one byte each",
            *VERDICTS.values(),
            "reads that were not right, in all",
        ],
        [
            [
                engine,
                *(f"{seen['verdicts'].get(verdict, 0) or ''}" for verdict in VERDICTS),
                ", ".join(
                    f"{count:,} {what}" for what, count in seen["outcomes"].items() if what != RIGHT
                ),
            ]
            for engine, seen in result["engines"].items()
        ],
    )
