"""`limited`: 500 MB of data in a process that may use 64 MiB, page cache included.

A memory cgroup holds the process, from before the engine's library is imported; what Python and the
harness have taken by then is subtracted from its limit. One process creates records, as many as the
time allows. Then the records are made without a limit, all of them or as many as a longer time
allows, are dropped from the page cache, and another process reads some at random. The kernel takes
page cache back where it can, and ends the process where that is not enough.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

from engines import ENGINES, OpenEngine
from filling import Records
from workers import Plan, Say, Skipped, Worker, WorkerError, noting_failure

from harness import describe_machine, key_of, markdown_table

LIMIT: Final = 64 << 20  # bytes
VALUE_SIZE: Final = 1000
RECORDS: Final = 500_000
QUICK_RECORDS: Final = 20_000
SECONDS: Final = (8.0, 20.0, 4.0)  # to create with little memory, to create with all, to read
QUICK_SECONDS: Final = (0.3, 0.3, 0.1)
READS: Final = 100  # between two looks at the clock
PATIENCE: Final = 60.0

_CGROUPS: Final = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group for memory, of version 1 or 2, near the one that this process is in.

    Raises:
        OSError: there are none here, or this process may not make one.
    """

    def __init__(self) -> None:
        parent, self._version = _find_parent()
        self._folder = parent / f"kvstore-bench-{os.getpid()}"
        self._folder.mkdir()

    def hold(self, pid: int, limit: int) -> None:
        """Take in a process, and let it have so many bytes, and no swap."""
        first, *others = (
            ("memory.max", "memory.swap.max")
            if self._version == 2
            else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness")
        )
        self._write(first, limit)
        for name in others:
            with suppress(OSError):  # not there without swap
                self._write(name, limit if "memsw" in name else 0)
        self._write("cgroup.procs", pid)

    @property
    def kills(self) -> int:
        """How many processes the kernel has ended here for want of memory."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        lines = (self._folder / name).read_text().splitlines()
        return int(dict(line.split() for line in lines).get("oom_kill", 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.rmdir()

    def _write(self, name: str, value: int) -> None:
        (self._folder / name).write_text(str(value))


def _find_parent() -> tuple[Path, int]:
    """Return the folder to make a group in, and the version of control groups."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for _, controllers, group in groups:
        if "memory" in controllers.split(","):
            return _CGROUPS / "memory" / group.lstrip("/"), 1
    for _, controllers, group in groups:
        # A group of version 2 hands on the controller of memory only while it has no processes of
        # its own: so not the one that this process is in, but one above it.
        own = _CGROUPS / group.lstrip("/")
        for folder in () if controllers else (own, *own.parents):
            handed_on = folder / "cgroup.subtree_control"
            if handed_on.is_file() and "memory" in handed_on.read_text().split():
                return folder, 2
    raise FileNotFoundError("no controller of memory is there")


def own_memory() -> int:
    """Return the bytes of anonymous memory of this process (RssAnon)."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def get_ready(_open: OpenEngine, _say: Say) -> int:
    """Task: return the memory that the process has before its work."""
    return own_memory()


class Notes:
    """Figures that outlive the process: a file, replaced each time they are set."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, float] = {"peak_anonymous_bytes": 0}

    def set(self, **figures: float) -> None:
        """Set these, and look at the memory."""
        peak = max(self._figures["peak_anonymous_bytes"], own_memory())
        self._figures |= {**figures, "peak_anonymous_bytes": peak}
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._figures))
        new.replace(self._path)


def create(
    open_engine: OpenEngine,
    say: Say,
    directory: Path,
    notes_path: Path,
    records: int,
    seconds: float,
) -> None:
    """Task: create records, as many as the time allows; note how far it is."""
    notes = Notes(notes_path)
    begin = perf_counter()
    store = open_engine(directory)
    Records(VALUE_SIZE).fill(
        store,
        range(records),
        seconds,
        say,
        lambda done: notes.set(count=done, seconds=perf_counter() - begin),
    )
    store.close()


def read(
    open_engine: OpenEngine,
    say: Say,
    directory: Path,
    notes_path: Path,
    records: int,
    seconds: float,
) -> None:
    """Task: read random ones of so many records, for some time; note how far it is."""
    notes = Notes(notes_path)
    rng = random.Random(6)
    store = open_engine(directory)
    count, taken = 0, 0.0
    begin = perf_counter()
    while taken < seconds:
        for _ in range(READS):
            store.read(key_of(rng.randrange(records)))
        count += READS
        taken = perf_counter() - begin
        say(f"{count:,} read")
        notes.set(count=count, seconds=taken)
    store.close()


def load(open_engine: OpenEngine, say: Say, directory: Path, records: int, seconds: float) -> int:
    """Task: create records, as many as the time allows; return their number."""
    store = open_engine(directory)
    created = Records(VALUE_SIZE).fill(store, range(records), seconds, say)
    store.close()
    return created


def measure(plan: Plan) -> dict[str, Any]:
    """Let each engine create and read in groups of its own.

    Raises:
        Skipped: no group can be made here, or files in the folder are memory themselves.
    """
    file_system = describe_machine(plan.place, ())["file_system"]
    if file_system in ("tmpfs", "ramfs"):
        raise Skipped(f"files in {plan.place} are in memory ({file_system}): see --dir")
    records = QUICK_RECORDS if plan.quick else RECORDS
    to_create, to_load, to_read = QUICK_SECONDS if plan.quick else SECONDS
    engines: dict[str, dict[str, Any]] = {}
    for engine in plan.engines:
        directory = plan.place / engine
        directory.mkdir()
        engines[engine] = {"create": _in_group(plan, engine, create, records, to_create)}
        shutil.rmtree(directory)
        if not ENGINES[engine].keeps_a_file:
            continue
        directory.mkdir()
        errors: dict[str, str] = {}
        with noting_failure(errors, "load"), Worker(engine, plan.progress, PATIENCE) as worker:
            loaded = worker.call(load, directory, records, to_load)
            engines[engine]["loaded"] = loaded
        if errors:
            engines[engine]["read"] = {"outcome": errors["load"]}
        else:
            _drop_from_cache(directory)
            engines[engine]["read"] = _in_group(plan, engine, read, loaded, to_read)
        shutil.rmtree(directory)
    return {
        "limit_bytes": LIMIT,
        "value_size": VALUE_SIZE,
        "records": records,
        "read_ahead_bytes": _read_ahead(plan.place),
        "engines": engines,
    }


def _in_group(
    plan: Plan,
    engine: str,
    task: Callable[[OpenEngine, Say, Path, Path, int, float], None],
    records: int,
    seconds: float,
) -> dict[str, Any]:
    """Have a process with little memory do a task; return its figures, and its outcome."""
    notes_path = plan.place / "notes.json"
    notes_path.write_text("{}")
    try:
        group = MemoryGroup()
    except OSError as error:
        raise Skipped(f"no memory cgroup can be made: {error}") from error
    outcome = "fine"
    with group:
        try:
            with Worker(engine, plan.progress, PATIENCE) as worker:
                group.hold(worker.pid, LIMIT - worker.call(get_ready))
                worker.call(task, plan.place / engine, notes_path, records, seconds)
        except WorkerError as error:
            outcome = "killed for want of memory" if group.kills else error.brief
    return {"outcome": outcome, **json.loads(notes_path.read_text())}


def _drop_from_cache(directory: Path) -> None:
    """Leave nothing of a folder's files in memory: what is there is counted as that of another."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_ahead(directory: Path) -> int | None:
    """Return how much the disk under `directory` reads at once where a mapped page is missing."""
    device = directory.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    try:
        return int((folder / "bdi/read_ahead_kb").read_text()) * 1024
    except (OSError, ValueError):
        return None


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    headings = [
        *("engine", "created", "creates a second", "private, MiB", "outcome"),
        *("reads of", "reads a second", "private, MiB", "outcome"),
    ]
    rows = []
    for engine, figures in result["engines"].items():
        created, seen = figures["create"], figures.get("read", {})
        rows.append(
            [
                engine,
                _count(created.get("count")),
                *_cells(created),
                _count(figures.get("loaded")),
                *_cells(seen),
            ]
        )
    table = markdown_table(headings, rows)
    if not result["read_ahead_bytes"]:
        return table
    return f"{table}\n\nThe disk reads ahead up to {result['read_ahead_bytes']:,} bytes."


def _cells(figures: dict[str, Any]) -> list[str]:
    """Return rate, most private memory, and outcome of a task."""
    count, peak = figures.get("count"), figures.get("peak_anonymous_bytes")
    return [
        f"{count / figures['seconds']:,.0f}" if count else "–",
        f"{peak / (1 << 20):.1f}" if peak else "–",
        figures.get("outcome", "–"),
    ]


def _count(count: int | None) -> str:
    return f"{count:,}" if count else "–"
