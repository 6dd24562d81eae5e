"""What the benchmarks share: keys and values, the record of the machine, progress, tables, results.

Keys and values are functions of their number, so that every process of a benchmark makes the same
ones without being sent them, and none has to be kept.
"""

import json
import os
import platform
import random
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any, Final

import orjson

KEY_SIZE: Final = 20  # bytes, and characters
RESULTS: Final = Path(__file__).resolve().parent / "results"
RESULT_FORMAT: Final = 2  # of the files there: add one where figures come under another name

_KEY_BITS: Final = KEY_SIZE * 4
_KEY_MASK: Final = (1 << _KEY_BITS) - 1
_KEY_MULTIPLIERS: Final = (0x9E3779B97F4A7C15F39D, 0xC2B2AE3D27D4EB4F1657)  # odd, so it is 1:1
_SMALLEST_VALUE: Final = 80  # bytes
_WORDS: Final = (
    *("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island"),
    *("juniper", "kettle", "lagoon", "meadow", "nectar", "orchard", "prairie", "quartz", "river"),
    *("summit", "timber", "upland", "valley", "willow", "yarrow", "zephyr"),
)
_SHORTEST_WORD: Final = min(map(len, _WORDS))


# --- keys and values -----------------------------------------------------------------------------


def key_of(index: int) -> str:
    """Return key number `index`: 20 hexadecimal digits in no order, different for each number."""
    number = index + 1
    for multiplier in _KEY_MULTIPLIERS:
        number = number * multiplier & _KEY_MASK
        number ^= number >> (_KEY_BITS // 2)
    return f"{number:0{KEY_SIZE}x}"


def make_keys(count: int, first: int = 0) -> list[str]:
    """Return the keys number `first` to `first + count - 1`."""
    return [key_of(index) for index in range(first, first + count)]


def make_values(size: int, count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return `count` flat objects like those of an application, each `size` bytes as compact JSON.

    Raises:
        ValueError: `size` is under 80 bytes.
    """
    if size < _SMALLEST_VALUE:
        raise ValueError(f"values of {size:,} bytes, at least {_SMALLEST_VALUE} are needed")
    rng = random.Random(seed)
    return [_make_value(size, rng) for _ in range(count)]


def _make_value(size: int, rng: random.Random) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": rng.randrange(10**6, 10**7),
        "name": rng.choice(_WORDS),
        "active": rng.random() < 0.5,
        "score": rng.randrange(1000) + 0.5,
        "note": "",
    }
    missing = size - len(orjson.dumps(value))
    while missing > 160:
        field = f"{rng.choice(_WORDS)}_{len(value)}"
        text = _text(rng.randrange(10, 120), rng)
        member = {field: rng.choice([rng.randrange(10**9), rng.random() < 0.5, text, text])}
        value |= member
        missing -= len(orjson.dumps(member)) - 1  # its braces, less a comma
    value["note"] = _text(missing, rng)
    if len(orjson.dumps(value)) != size:
        raise AssertionError(f"made a value of another size than {size:,} bytes: {value!r}")
    return value


def _text(length: int, rng: random.Random) -> str:
    """Return `length` characters of words."""
    words = rng.choices(_WORDS, k=length // _SHORTEST_WORD + 1)
    return " ".join(words)[:length]


# --- the machine ---------------------------------------------------------------------------------


def describe_machine(
    directory: Path, libraries: Iterable[str], engines: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return what figures depend on: machine, Python, versions, file system of a folder.

    Args:
        directory: the folder.
        libraries: names of packages.
        engines: what stores each engine's records, with its version.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "file_system": file_system(directory),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "libraries": {name: _version(name) for name in libraries},
        "engines": engines or {},
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return the record of `describe_machine` as a line of text."""
    versions = [f"{name} {version}" for name, version in machine["libraries"].items()]
    versions += dict.fromkeys(machine["engines"].values())
    return (
        f"{machine['date']}: {machine['cpu']}, {machine['cpu_count']} CPUs, {machine['system']}, "
        f"{machine['file_system']}; {machine['python']}, {', '.join(versions)}"
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def file_system(directory: Path) -> str:
    """Return the type of the file system that `directory` is on, where Linux tells it."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    resolved = directory.resolve()
    found = (0, "unknown")
    for mount in mounts:
        _, place, kind, *_ = mount.split()
        if resolved.is_relative_to(place):
            found = max(found, (len(place), kind))
    return found[1]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "of no installed package"


# --- running -------------------------------------------------------------------------------------


def to_json(result: Mapping[str, Any]) -> str:
    """Return a result as JSON to be kept: indented, but with each list of numbers on one line."""
    text = json.dumps(result, indent=2)
    return re.sub(
        r"\[\n\s+([-+.\deE,\s]+?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )


class Progress:
    """One line on standard error that says how far it is; nothing where that is no terminal."""

    heading = ""
    """What each of them begins with."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._began = monotonic()

    def show(self, text: str) -> None:
        """Put `text` in the place of what was there."""
        if self._shown:
            if text:
                minutes, seconds = divmod(int(monotonic() - self._began), 60)
                text = f"{minutes}:{seconds:02} {self.heading}{text}"
            print(f"\r\x1b[K{text[:100]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the line empty."""
        self.show("")


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns line up as plain text too; all but the first to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [lines[0], rule, *lines[1:]]
    )
