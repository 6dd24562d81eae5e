"""What each engine does on a full disk, with one byte of its files changed, and what it counts.

Full disk: a small disk in memory is mounted. A process creates records until that fails, reads all
of them, deletes a tenth, creates half as many new ones, and closes; another one opens the store on
the disk, still full, and looks for everything that was acknowledged and not deleted.

Changed byte: in each trial a closed store is copied and one byte of the copy, of those that are not
zero, is changed to another by chance. A process opens it and reads everything. JSON that no longer
parses counts as an error, though it is the adapter here that finds it.

What has expired, and is not yet taken back, may be in the number of keys that an engine tells. It
is asked where it has a time to live of its own and a way to count: kvstore's `len`, and the like.

Engines differ in what they promise. An error is what a user can act on; a dead process, a value
that nobody stored, and a key that is gone without a word are not.
"""

import json
import os
import random
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import rmtree, which
from signal import Signals
from time import sleep
from typing import Any, Final

from engines import Engine, OpenEngine
from footprint import copy_folder
from records import Records, key_of, outcome_of
from workers import Say, Task, Worker, WorkerError, noting_failure

from harness import Column, Plan, Skipped, engine_table, with_failures

FULL_SIZE: Final = 8000  # of a value on a full disk
# In bytes; the tables of Tkrzw and Kyoto Cabinet alone take 52 MB.
DISKS: Final = (96 << 20, 64 << 20, 6 << 20)
DELETED: Final = 10  # one record in so many
PHASES: Final = ("fill", "read", "delete", "create", "close")

FLIPPED_SIZE: Final = 200  # of a value where a byte is changed
RECORDS: Final = 3000
TRIALS: Final = 40
EXPIRING: Final = 10  # records
PATIENCE: Final = 20.0  # seconds that a trial may take
# How a trial may end, the worst first, by how outcomes of it begin.
VERDICTS: Final = {
    "wrong": "wrong values",
    "absent": "keys lost without a word",
    "dies": "process dies",
    "no sign of life": "hangs",
    "not opened": "error on opening",
    "": "errors for some keys",
}
FINE: Final = "no harm"
# For the process of an engine that takes damage for sizes: far more than any needs.
_LIMITS: Final = {
    resource.RLIMIT_DATA: 4 << 30,
    resource.RLIMIT_FSIZE: 9 << 30,
    resource.RLIMIT_CORE: 0,
}

Outcomes = dict[str, int]


def _brace() -> None:
    """Have this process, which may die, print nothing, and not take the machine with it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    for limit, most in _LIMITS.items():
        with suppress(ValueError, OSError):  # where less is allowed already
            resource.setrlimit(limit, (most, most))


def fill_disk(
    open_engine: OpenEngine, _say: Say, folder: Path, noted: Path, limit: int
) -> Outcomes:
    """Task: fill the disk that a folder is on, and go on; this may die.

    A file that is not there, `noted`, gets a line of JSON for each phase, and one beside it the
    number of records that were acknowledged. The disk cannot hold `limit` records.
    """
    _brace()
    known = Records(FULL_SIZE)
    store = open_engine(folder)
    with noted.open("w") as notes, noted.with_suffix(".count").open("r+b") as counted:

        def note(outcomes: Iterable[str]) -> None:
            print(json.dumps(Counter(outcomes)), file=notes, flush=True)

        created, failure = 0, "right"
        while created < limit and failure == "right":
            failure = outcome_of(partial(store.create, *known.record(created)))
            created += failure == "right"
            os.pwrite(counted.fileno(), b"%d" % created, 0)
        note(["nothing" if failure == "right" else failure])
        note(outcome for _, outcome in known.outcomes(store, range(created)))
        doomed = [key_of(index) for index in range(0, created, DELETED)]
        note(outcome_of(partial(store.delete, key)) for key in doomed)
        added = range(limit, limit + len(doomed) // 2)
        note(outcome_of(partial(store.create, *known.record(index))) for index in added)
        note([outcome_of(store.close)])
    return {}


def count_expired(open_engine: OpenEngine, _say: Say, folder: Path) -> str:
    """Task: return whether the number of keys that the engine tells includes what has expired."""
    folder.mkdir()
    with closing(open_engine(folder)) as store:
        if not isinstance(store, Sized):
            return "no `len`, or no time to live"
        for index in range(2 * EXPIRING):
            key, value, _ = Records(FLIPPED_SIZE).record(index)
            store.create(key, value, 1 if index < EXPIRING else None)
        sleep(2.1)  # some count in whole seconds
        return {EXPIRING: "not counted", 2 * EXPIRING: "counted"}.get(len(store), f"{len(store)}?")


def make_store(open_engine: OpenEngine, _say: Say, folder: Path, records: int) -> None:
    """Task: leave a store of some records, closed twice: for some tidy up when they are opened."""
    folder.mkdir()
    known = Records(FLIPPED_SIZE)
    store = open_engine(folder)
    for index in range(records):
        store.create(*known.record(index))
    store.close()
    open_engine(folder).close()


def read_all(
    open_engine: OpenEngine, _say: Say, folder: Path, size: int, records: Sequence[int]
) -> Outcomes:
    """Task: open the store and read some records, whose values are of that size."""
    _brace()
    opened: list[Engine] = []
    outcome = outcome_of(lambda: opened.append(open_engine(folder)))
    if not opened:
        return {f"not opened: {outcome}": 1}
    (store,) = opened
    outcomes = Counter(outcome for _, outcome in Records(size).outcomes(store, records))
    if (outcome := outcome_of(store.close)) != "right":
        outcomes[f"closing: {outcome}"] = 1
    return dict(outcomes)


def measure(plan: Plan) -> dict[str, Any]:
    """Return what came of full disks and of changed bytes, and who counts what has expired."""
    disk = plan.pick(*DISKS)
    trials, records = plan.pick((TRIALS, RECORDS), (3, 300), (1, 300))
    full: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for engine in plan.with_file():
        try:
            full[engine] = _fill_disk(plan, engine, disk)
        except Skipped as reason:
            failures["the full disk"] = str(reason)
    flipped: dict[str, Any] = {}
    for engine in plan.with_file():
        with noting_failure(failures, f"{engine}, with a changed byte,"):
            flipped[engine] = _flip_bytes(plan, engine, trials, records)
    expired: dict[str, str] = {}
    for engine in plan.with_file():
        with noting_failure(failures, f"{engine}, counting,"), Worker(plan, engine) as worker:
            expired[engine] = worker.call(count_expired, plan.place / f"{engine}-counting")
    return {
        "disk_bytes": disk,
        "trials": trials,
        "failures": failures,
        "engines": {
            engine: {
                "full_disk": full.get(engine, {}),
                "flipped": flipped.get(engine, {}),
                "expired": expired.get(engine, "unknown"),
            }
            for engine in plan.with_file()
        },
    }


def _fill_disk(plan: Plan, engine: str, size: int) -> dict[str, Any]:
    """Return how many records were acknowledged, and what came of each phase."""
    limit = size // FULL_SIZE * 3  # some compress
    noted = plan.place / f"{engine}.notes"
    noted.touch()
    noted.with_suffix(".count").write_text("0")
    with mounted(plan.place / "disk", size) as disk:
        with Worker(plan, engine) as worker:
            died = _outcomes(worker, fill_disk, disk, noted, limit)
        notes = [json.loads(line) for line in noted.read_text().splitlines()]
        # The phase that it died in has that for its outcome.
        phases: dict[str, Outcomes] = dict(zip(PHASES, [*notes, died], strict=False))
        created = int(noted.with_suffix(".count").read_text())
        records = [index for index in range(created) if index % DELETED]
        if set(phases.get("create", {})) == {"right"}:
            records += range(limit, limit + phases["create"]["right"])
        with Worker(plan, engine) as worker:
            again = _outcomes(worker, read_all, disk, FULL_SIZE, records)
    return {"records": created, **phases, "again": again}


def _outcomes(worker: Worker, task: Task[..., Outcomes], *arguments: Any) -> Outcomes:
    """Return what a task does, or how the process ended, which is then gone."""
    try:
        return worker.call(task, *arguments)
    except WorkerError as error:
        worker.kill()
        return {how_it_ended(error): 1}


@contextmanager
def mounted(disk: Path, size: int) -> Iterator[Path]:
    """Mount a disk of `size` bytes in memory.

    Raises:
        Skipped: that cannot be done here.
    """
    disk.mkdir(exist_ok=True)
    if sys.platform != "linux" or which("mount") is None:
        raise Skipped("a disk in memory is mounted, which is written for Linux")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no disk can be mounted: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, capture_output=True)


def how_it_ended(error: WorkerError) -> str:
    """Return how a process ended that did not get to the end of its task."""
    if error.exit_code is None:
        return error.brief
    return f"dies: {Signals(-error.exit_code).name}" if error.exit_code < 0 else "dies"


def _flip_bytes(plan: Plan, engine: str, trials: int, records: int) -> dict[str, int]:
    """Return how often each verdict was reached."""
    verdicts: Counter[str] = Counter()
    intact = plan.place / engine
    rng = random.Random(6)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(plan, engine, PATIENCE))
        worker.call(make_store, intact, records)
        for number in range(trials):
            plan.progress.show(f"{engine}: byte {number + 1} of {trials}")
            # A name of its own: a store that could not be opened may be held open all the same.
            copy = plan.place / f"{engine}-{number}"
            copy_folder(intact, copy)
            flip_byte(copy, rng)
            seen = _outcomes(worker, read_all, copy, FLIPPED_SIZE, range(records))
            if worker.is_dead:
                worker = stack.enter_context(Worker(plan, engine, PATIENCE))
            verdicts[verdict_of(seen)] += 1
            rmtree(copy)
    rmtree(intact)
    return dict(verdicts)


def flip_byte(folder: Path, rng: random.Random) -> None:
    """Change one byte, of those that are not zero, in the files of a folder."""
    parts = [
        (path, start, end)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for start, end in data_ranges(path)
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


def data_ranges(path: Path) -> Iterator[tuple[int, int]]:
    """Yield where the parts of a file that are no holes begin and end."""
    with path.open("rb") as file, suppress(OSError):  # ENXIO: nothing but a hole is left
        end = 0
        while True:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def verdict_of(seen: Outcomes) -> str:
    """Return which of `VERDICTS` a trial ends with, or that there is nothing bad about it."""
    bad = [what for what in seen if what != "right"]
    ends = (
        verdict
        for beginning, verdict in VERDICTS.items()
        if any(what.startswith(beginning) for what in bad)
    )
    return next(ends, FINE)


def format_result(result: Mapping[str, Any]) -> str:
    """Return one table."""
    columns: list[Column] = [
        (f"{result['trials']} times one byte changed", show_verdicts, ("flipped",)),
        (f"on a full disk of {result['disk_bytes'] >> 20} MiB", show_phases, ("full_disk",)),
        ("what has expired, in `len`", str, ("expired",)),
    ]
    return with_failures([engine_table("failures", result["engines"], columns)], result["failures"])


def show_verdicts(verdicts: Mapping[str, int]) -> str:
    """Return how often each verdict was reached, as text; the worst first."""
    ordered = [verdict for verdict in (*VERDICTS.values(), FINE) if verdict in verdicts]
    return ", ".join(f"{verdict} {verdicts[verdict]}×" for verdict in ordered) or "not tried"


def show_phases(phases: Mapping[str, Any]) -> str:
    """Return what creating raised, and what did not go right then, as text."""
    if not phases:
        return "not tried"
    bad = {
        phase: show(outcomes)
        for phase, outcomes in phases.items()
        if phase not in {"records", "fill"} and set(outcomes) - {"right"}
    }
    told = [f"{phase}: {text}" for phase, text in bad.items()] or ["then all right"]
    return "; ".join([f"{', '.join(phases.get('fill', {}))} at {phases['records']:,}", *told])


def show(outcomes: Outcomes) -> str:
    """Return outcomes as text: "all right" where they are."""
    if set(outcomes) <= {"right"}:
        return "all right"
    return ", ".join(f"{count:,} {what}" for what, count in outcomes.items())
