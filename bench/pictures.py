"""Which figures of which experiment are drawn, and how."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from charts import Line, Range, draw_dots, draw_lines
from histogram import Histogram
from workers import spread

# Of the percentile curves, beside the longest of all.
_SHARES: Final = (0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 0.99995)
_SHARE_TICKS: Final[dict[float, str]] = {
    2: "50 %", 10: "90 %", 100: "99 %", 1000: "99.9 %", 10_000: "99.99 %", 100_000: "99.999 %",
}  # fmt: skip
_GROWTH_PANELS: Final = {
    "grow": "create, mean since the size before",
    "read": "read",
    "miss": "miss",
    "delete": "delete",
}
_MEBIBYTE: Final = 1 << 20


class Picture(NamedTuple):
    """A chart that was drawn."""

    path: Path
    shows: str
    """In words, for those who do not see it."""


Result = Mapping[str, Any]


def draw(name: str, result: Result, folder: Path) -> list[Picture]:
    """Draw the charts of an experiment, none for some, into `folder`."""
    return list(_DRAWINGS[name](result, folder)) if name in _DRAWINGS else []


def _operations(result: Result, folder: Path) -> Iterable[Picture]:
    for size in dict.fromkeys(row["value_size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["value_size"] == size]
        shows = f"Time of an operation, values of {size:,} bytes, {rows[0]['records']:,} records"
        path = folder / f"operations-{size}.svg"
        panels = {row["operation"]: _ranges(row["microseconds"]) for row in rows}
        draw_dots(path, shows, panels, "µs: median and extremes")
        yield Picture(path, shows)


def _mixes(result: Result, folder: Path) -> Iterable[Picture]:
    shows = f"Time of an operation in mixes of them, values of {result['value_size']:,} bytes"
    path = folder / "mixes.svg"
    panels = {
        f"{row['mix']}: {row['share_of_reads']:.0%} reads": _ranges(row["microseconds"])
        for row in result["rows"]
    }
    draw_dots(path, shows, panels, "µs: median and extremes")
    yield Picture(path, shows)


def _growth(result: Result, folder: Path) -> Iterable[Picture]:
    shows = f"Time of an operation in a store of so many records of {result['value_size']:,} bytes"
    path = folder / "growth.svg"
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {
        title: {} for title in _GROWTH_PANELS.values()
    }
    for row in result["rows"]:
        for operation, title in _GROWTH_PANELS.items():
            line = panels[title].setdefault(row["engine"], [])
            line.append((row["records"], row["microseconds"][operation]["median"]))
    draw_lines(path, shows, panels, ("records", "µs"))
    yield Picture(path, shows)


def _latency(result: Result, folder: Path) -> Iterable[Picture]:
    shows = f"How long single operations take while a store grows to {result['records']:,} records"
    path = folder / "latency.svg"
    panels: dict[str, dict[str, Line]] = {
        operation: {
            engine: _percentiles(seen["histograms"][operation])
            for engine, seen in result["engines"].items()
        }
        for operation in ("create", "read")
    }
    share = (
        "share of operations that take no longer (the last mark of a line is the longest of all)"
    )
    draw_lines(path, shows, panels, (share, "µs"), _SHARE_TICKS, columns=1)
    yield Picture(path, shows)


def _percentiles(stored: Any) -> Line:
    """Return the percentiles as a line to the longest: at 10 what 1 of 10 exceeds, and so on."""
    histogram = Histogram.from_json(stored)
    shares = [share for share in _SHARES if 1 / (1 - share) < histogram.total]
    line = [(1 / (1 - share), histogram.percentile(share) / 1000) for share in shares]
    return [*line, (histogram.total, histogram.largest / 1000)]


def _threads(result: Result, folder: Path) -> Iterable[Picture]:
    shows = f"Throughput of threads together, values of {result['value_size']:,} bytes"
    path = folder / "threads.svg"
    panels: dict[str, dict[str, Line]] = {}
    for row in result["rows"]:
        panels.setdefault(row["load"], {})[row["engine"]] = [
            (int(threads), figures["median"])
            for threads, figures in row["operations_per_second"].items()
        ]
    draw_lines(path, shows, panels, ("threads", "operations a second"), columns=len(panels))
    yield Picture(path, shows)


def _durable(result: Result, folder: Path) -> Iterable[Picture]:
    shows = "Operations a second that are on stable storage, by threads"
    path = folder / "durable.svg"
    panels: dict[str, dict[str, Range]] = {}
    for row in result["rows"]:
        for threads, figures in row["operations_per_second"].items():
            name = f"{row['operation']}, {threads} thread{'s' * (threads != '1')}"
            panels.setdefault(name, {})[row["engine"]] = _range(figures)
    draw_dots(path, shows, panels, "operations a second", more_is_better=True)
    yield Picture(path, shows)


def _memory(result: Result, folder: Path) -> Iterable[Picture]:
    shows = "Private memory: what an import adds, and with records of 100 bytes in the store"
    path = folder / "memory.svg"
    panels = {
        "import, beyond orjson": {
            engine: _range(each["bytes"], 1 / _MEBIBYTE)
            for engine, each in result["imports"].items()
            if each["bytes"]["min"] > 0
        },
        f"process with {result['records']:,} records": {
            engine: _single(each["late_bytes"] / _MEBIBYTE)
            for engine, each in result["heap"].items()
            if each["records"] == result["records"]
        },
    }
    draw_dots(path, shows, panels, "MiB")
    yield Picture(path, shows)


def _limited(result: Result, folder: Path) -> Iterable[Picture]:
    limit = result["limit_bytes"] // _MEBIBYTE
    shows = f"Throughput in {limit} MiB of memory, of those that lived"
    path = folder / "limited.svg"
    panels = {
        f"{task}s": {
            engine: _single(each[task]["count"] / each[task]["seconds"])
            for engine, each in result["engines"].items()
            if each.get(task, {}).get("outcome") == "fine"
        }
        for task in ("create", "read")
    }
    draw_dots(path, shows, panels, "operations a second", more_is_better=True)
    yield Picture(path, shows)


def _opening(result: Result, folder: Path) -> Iterable[Picture]:
    shows = f"Time to open a store of up to {result['records']:,} records"
    path = folder / "opening.svg"
    engines = result["engines"]
    whole = [engine for engine, each in engines.items() if each.get("came_back") == each["records"]]
    panels = {
        title: {
            engine: _range(spread(engines[engine][how]), 1e3)
            for engine in shown
            if engines[engine][how]
        }
        for how, title, shown in (
            ("closed", "after it was closed", engines),
            ("killed", "after SIGKILL, where all came back", whole),
        )
    }
    draw_dots(path, shows, panels, "ms: median and extremes")
    yield Picture(path, shows)


def _ranges(by_engine: Mapping[str, Mapping[str, float]]) -> dict[str, Range]:
    return {engine: _range(figures) for engine, figures in by_engine.items()}


def _range(figures: Mapping[str, float], factor: float = 1) -> Range:
    return Range(*(figures[name] * factor for name in ("median", "min", "max")))


def _single(figure: float) -> Range:
    return Range(figure, figure, figure)


_DRAWINGS: Final[dict[str, Callable[[Result, Path], Iterable[Picture]]]] = {
    "operations": _operations,
    "mixes": _mixes,
    "growth": _growth,
    "latency": _latency,
    "threads": _threads,
    "durable": _durable,
    "memory": _memory,
    "limited": _limited,
    "opening": _opening,
}
