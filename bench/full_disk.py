"""What a store does on a disk that it has filled itself.

A small disk in memory is mounted for each engine. A process creates records until that fails, reads
all of them, deletes a tenth, creates half as many new ones, and closes; another one opens the store
on the disk, still full, and looks for everything that was acknowledged and not deleted. The first
may die of it: how many records were acknowledged is noted in a file elsewhere.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from shutil import which
from struct import Struct
from typing import Any, Final

from engines import Engine, OpenEngine
from filling import Records
from outcomes import (
    RIGHT,
    Outcomes,
    count_calls,
    count_reads,
    how_it_ended,
    name_of,
    prepare_for_harm,
    show,
)
from workers import Plan, Say, Skipped, Worker, WorkerError

from harness import key_of, markdown_table

VALUE_SIZE: Final = 8000
DISK: Final = 96 << 20  # bytes; the tables of Tkrzw and Kyoto Cabinet alone take 52 MB
QUICK_DISK: Final = 64 << 20
TINY_DISK: Final = 16 << 20
PATIENCE: Final = 60.0  # seconds
DELETED: Final = 10  # one record in so many

_COUNT: Final = Struct("<Q")


# --- in the process of the engine ----------------------------------------------------------------


def fill_disk(
    open_engine: OpenEngine, say: Say, folder: Path, noted: Path, limit: int
) -> Iterator[tuple[str, Outcomes]]:
    """Task: yield the name of each phase, and what came of its calls.

    Args:
        open_engine: opens the store.
        say: hears of the progress.
        folder: on the disk.
        noted: a file of 8 bytes on another disk, for the number of records acknowledged.
        limit: more records than the disk can hold.
    """
    prepare_for_harm()
    known = Records(VALUE_SIZE)
    store = open_engine(folder)
    acknowledged, failure = _fill(store, known, noted, limit)
    say(f"full with {acknowledged:,} records")
    yield "fill", {failure: 1}
    yield "read", count_reads(store, known, range(acknowledged))
    doomed = range(0, acknowledged, DELETED)
    yield "delete", count_calls(store.delete, ((key_of(index),) for index in doomed))
    added = range(limit, limit + len(doomed) // 2)
    records = ((key_of(index), known.value(index), None) for index in added)
    yield "create", count_calls(store.create, records)
    yield "close", count_calls(store.close, [()])


def _fill(store: Engine, known: Records, noted: Path, limit: int) -> tuple[int, str]:
    """Create records until one fails; return how many did not, and what it raised."""
    with noted.open("r+b") as file, mmap(file.fileno(), _COUNT.size) as count:
        for index in range(limit):
            try:
                store.create(key_of(index), known.value(index), None)
            except Exception as error:
                return index, name_of(error)
            _COUNT.pack_into(count, 0, index + 1)
    return limit, "nothing"


def look_again(open_engine: OpenEngine, _say: Say, folder: Path, records: list[int]) -> Outcomes:
    """Task: open the store and read some records."""
    prepare_for_harm()
    try:
        store = open_engine(folder)
    except Exception as error:
        return {f"not opened: {name_of(error)}": 1}
    return count_reads(store, Records(VALUE_SIZE), records)


# --- in the parent -------------------------------------------------------------------------------


def measure_full_disks(plan: Plan, engines: list[str]) -> dict[str, Any]:
    """Return what came of each phase, by engine; or why it could not be tried, as `skipped`."""
    size = TINY_DISK if plan.tiny else QUICK_DISK if plan.quick else DISK
    seen: dict[str, Any] = {}
    try:
        for engine in engines:
            with _mounted(plan.place, size) as disk:
                seen[engine] = _try_engine(plan, engine, disk, size // VALUE_SIZE * 2)
    except Skipped as reason:
        return {"skipped": str(reason)}
    return {"disk_bytes": size, "value_size": VALUE_SIZE, "engines": seen}


@contextmanager
def _mounted(place: Path, size: int) -> Iterator[Path]:
    """Mount a disk of `size` bytes in memory.

    Raises:
        Skipped: that cannot be done here.
    """
    disk = place / "disk"
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


def _try_engine(plan: Plan, engine: str, disk: Path, limit: int) -> dict[str, Any]:
    """Return how many records were acknowledged, and what came of each phase."""
    folder = disk / engine
    folder.mkdir()
    noted = plan.place / "noted"
    noted.write_bytes(_COUNT.pack(0))
    phases: dict[str, Outcomes] = {}
    died = None
    with Worker(engine, plan.progress, PATIENCE) as worker:
        try:
            phases.update(worker.steps(fill_disk, folder, noted, limit))
        except WorkerError as error:
            died = how_it_ended(error)
            worker.kill()
    (acknowledged,) = _COUNT.unpack(noted.read_bytes())
    records = [index for index in range(acknowledged) if index % DELETED]
    created = phases.get("create", {})
    if set(created) == {RIGHT}:
        records += range(limit, limit + created[RIGHT])
    with Worker(engine, plan.progress, PATIENCE) as worker:
        try:
            again = worker.call(look_again, folder, records)
        except WorkerError as error:
            again = {how_it_ended(error): 1}
            worker.kill()
    return {"acknowledged": acknowledged, "phases": phases, "died": died, "again": again}


def format_full_disks(result: dict[str, Any]) -> str:
    """Return the phases as a table."""
    if "skipped" in result:
        return f"Full disk, skipped: {result['skipped']}"
    return markdown_table(
        [
            f"on a full disk of {result['disk_bytes'] >> 20} MiB",
            "records taken",
            "create raises",
            "reads",
            "deletes",
            "then creates",
            "closes",
            "opened again",
        ],
        [
            [engine, f"{each['acknowledged']:,}", *_show_phases(each)]
            for engine, each in result["engines"].items()
        ],
    )


def _show_phases(seen: dict[str, Any]) -> Iterator[str]:
    """Yield what came of each phase, as text."""
    died = seen["died"]
    for name, everything in (
        ("fill", ""),
        ("read", "all"),
        ("delete", "yes"),
        ("create", "yes"),
        ("close", "yes"),
    ):
        if name not in seen["phases"]:
            yield died or "–"
            died = None
        elif name == "fill":
            yield ", ".join(seen["phases"][name])
        else:
            yield show(seen["phases"][name], everything)
    yield show(seen["again"], "all is there")
