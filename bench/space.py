"""`space`: bytes of file for each record, and how much fits into 1,000,000,000 bytes.

Each engine creates as many records as it can in some seconds, up to a number, of each size of value
under keys of 20 bytes, and then all cities (see `cities`), under their numbers. The store is
closed, and opened and closed again, for some engines tidy up only then. Counted is what the file
system has allocated to its files: the file of LMDB is a map of 8 GiB with holes.

How many records fit is, for kvstore, found by filling it (see `capacity`): with one of its
implementations, the compiled one if it is there, for their files are the same. For the others, and
beside that for kvstore too, it is what follows from the bytes of these records, less those of an
empty store; the two figures of kvstore show how rough that is. The values are made of a few words:
engines that compress them save more than they might elsewhere.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import orjson
from capacity import QUICK_SIZES, SIZES, format_capacity, measure_capacity
from cities import read_cities, write_cities
from engines import ENGINES, OpenEngine
from files import allocated
from filling import Records
from operations import failure_lines
from workers import Plan, Say, Skipped, Worker, noting_failure

from harness import KEY_SIZE, markdown_table

RECORDS: Final = {100: 500_000, 1000: 100_000, 16_000: 10_000}  # by size of value
QUICK_RECORDS: Final = {100: 2000, 1000: 1000, 16_000: 100}
TINY_RECORDS: Final = {100: 500}
ALLOWANCE: Final = 4.0  # seconds for the records of one size
FULL: Final = 1_000_000_000  # bytes
QUICK_FULL: Final = 8 << 20
TINY_FULL: Final = 4 << 20
CITIES: Final = "cities"

Figures = dict[str, Any]


def fill(
    open_engine: OpenEngine, say: Say, folder: Path, size: int, records: int, allowance: float
) -> int:
    """Task: create records in a new store, as many as the time allows; return how many."""
    with closing(open_engine(folder)) as store:
        created = Records(size).fill(store, range(records), allowance, say)
    open_engine(folder).close()
    return created


def fill_with_cities(open_engine: OpenEngine, say: Say, folder: Path, path: Path) -> int:
    """Task: create a record for each city; return how many."""
    say(CITIES)
    cities = read_cities(path)
    with closing(open_engine(folder)) as store:
        for name, city in cities.items():
            store.create(name, city, None)
    open_engine(folder).close()
    return len(cities)


def measure(plan: Plan) -> dict[str, Any]:
    """Return bytes a record and records that fit, by data and engine; and what kvstore held."""
    sizes = TINY_RECORDS if plan.tiny else QUICK_RECORDS if plan.quick else RECORDS
    engines = [engine for engine in plan.engines if ENGINES[engine].keeps_a_file]
    stored = {f"{size}": float(KEY_SIZE + size) for size in sizes}
    path = None
    try:
        path, _ = write_cities(plan)
    except Skipped:
        pass
    else:
        stored[CITIES] = _mean_size(path)
    failed: dict[str, str] = {}
    seen: dict[str, dict[str, Figures]] = {}
    for engine in engines:
        with noting_failure(failed, engine):
            seen[engine] = dict(_measure_engine(plan, engine, sizes, path))
    capacity = []
    filled = next((engine for engine in engines if ENGINES[engine].module == "kvstore"), None)
    if filled:
        with noting_failure(failed, f"{filled}, filled"):
            capacity = list(_measure_capacity(plan, filled))
    return {
        "key_and_value_bytes": stored,
        "allowance_seconds": ALLOWANCE,
        "full_bytes": FULL,
        "engines": seen,
        "filled": filled,
        "capacity": capacity,
        "failures": failed,
    }


def _mean_size(path: Path) -> float:
    cities = read_cities(path)
    return sum(len(name) + len(orjson.dumps(city)) for name, city in cities.items()) / len(cities)


def _measure_engine(
    plan: Plan, engine: str, sizes: dict[int, int], path: Path | None
) -> Iterator[tuple[str, Figures]]:
    """Yield what each kind of data takes."""
    folder = plan.place / engine
    with Worker(engine, plan.progress) as worker:
        folder.mkdir()
        worker.call(fill, folder, min(sizes), 0, 0.0)
        empty = allocated(folder)
        for size, records in sizes.items():
            _renew(folder)
            created = worker.call(fill, folder, size, records, ALLOWANCE)
            yield f"{size}", _figures(folder, created, empty)
        if path is not None:
            _renew(folder)
            yield CITIES, _figures(folder, worker.call(fill_with_cities, folder, path), empty)
    rmtree(folder)


def _renew(folder: Path) -> None:
    rmtree(folder)
    folder.mkdir()


def _figures(folder: Path, records: int, empty: int) -> Figures:
    """Return what follows from what a store of so many records takes, and an empty one."""
    used = allocated(folder)
    grown = used - empty  # nothing, where a few records went into an empty file
    return {
        "records": records,
        "allocated_bytes": used,
        "allocated_bytes_empty": empty,
        "bytes_per_record": used / records,
        "records_that_fit": (FULL - empty) * records // grown if grown > 0 else None,
    }


def _measure_capacity(plan: Plan, engine: str) -> Iterator[dict[str, Any]]:
    """Yield what kvstore held until it was full, for each size of value."""
    max_bytes = TINY_FULL if plan.tiny else QUICK_FULL if plan.quick else FULL
    folder = plan.place / "capacity"
    folder.mkdir()
    with Worker(engine, plan.progress) as worker:
        for size, twice in (QUICK_SIZES if plan.quick else SIZES).items():
            yield worker.call(measure_capacity, folder, engine, size, max_bytes, twice)


def format_result(result: dict[str, Any]) -> str:
    """Return bytes a record, records that fit, and what kvstore held as tables."""
    stored = result["key_and_value_bytes"]
    columns = {
        name: f"cities, {mean:.0f} B" if name == CITIES else f"{int(name):,} B"
        for name, mean in stored.items()
    }
    engines = result["engines"]
    held = {
        f"{each['value_size']}": f"{each['records']:,}"
        for each in result["capacity"]
        if each["max_bytes"] == result["full_bytes"]
    }
    bytes_table = markdown_table(
        ["bytes a record (times key and value)", *columns.values()],
        [
            [engine, *(_show_bytes(figures[name], stored[name]) for name in columns)]
            for engine, figures in engines.items()
        ],
    )
    fits_table = markdown_table(
        [f"records in {result['full_bytes']:,} bytes", *columns.values(), "follows from records"],
        [
            *(
                [[f"{result['filled']}, filled", *(held.get(name, "") for name in columns), ""]]
                if held
                else []
            ),
            *(
                [
                    engine,
                    *(_show_count(figures[name]["records_that_fit"]) for name in columns),
                    " / ".join(f"{figures[name]['records']:,}" for name in columns),
                ]
                for engine, figures in engines.items()
            ),
        ],
    )
    tables = [bytes_table, fits_table]
    if result["capacity"]:
        tables.append(format_capacity(result["capacity"]))
    return "\n\n".join(tables + failure_lines(result["failures"]))


def _show_bytes(figures: Figures, stored: float) -> str:
    return f"{figures['bytes_per_record']:,.0f} ({figures['bytes_per_record'] / stored:.2f})"


def _show_count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
