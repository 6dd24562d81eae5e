"""`harm`: what each engine does on a full disk (see `full_disk`) and with one byte changed.

For the second see `flipped`. Engines differ in what they promise. An error is what a user can act
on; a dead process, a value that nobody stored, and a key that is gone without a word are not. JSON
that no longer parses counts as an error, though it is the adapter here that finds it.
"""

from typing import Any

from engines import ENGINES
from flipped import format_flips, measure_flips
from full_disk import format_full_disks, measure_full_disks
from workers import Plan


def measure(plan: Plan) -> dict[str, Any]:
    """Return what came of full disks and of flipped bytes."""
    engines = [engine for engine in plan.engines if ENGINES[engine].keeps_a_file]
    return {
        "full_disk": measure_full_disks(plan, engines),
        "flipped": measure_flips(plan, engines),
    }


def format_result(result: dict[str, Any]) -> str:
    """Return two tables."""
    return f"{format_full_disks(result['full_disk'])}\n\n{format_flips(result['flipped'])}"
