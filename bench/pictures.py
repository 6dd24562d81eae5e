"""Which figures of which experiment are drawn, and how."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
_MICROSECONDS: Final = "µs: median and extremes"


class Picture(NamedTuple):
    """A chart that was drawn."""

    path: Path
    shows: str
    """In words, for those who do not see it."""


class _Chart(NamedTuple):
    """A chart that is to be drawn."""

    name: str
    shows: str
    panels: Mapping[str, Mapping[str, Any]]
    """Figures or lines by engine, by what they are of."""
    draw: Callable[..., None]
    options: dict[str, Any]


Result = Mapping[str, Any]


def draw(name: str, result: Result, folder: Path) -> list[Picture]:
    """Draw the charts of an experiment, none for some, into `folder`."""
    pictures = []
    for chart in _CHARTS[name](result) if name in _CHARTS else ():
        panels = {title: figures for title, figures in chart.panels.items() if figures}
        if panels:
            picture = Picture(folder / f"{chart.name}.svg", chart.shows)
            chart.draw(picture.path, chart.shows, panels, **chart.options)
            pictures.append(picture)
    return pictures


def _dots(
    name: str, shows: str, panels: Mapping[str, Mapping[str, Range]], unit: str, **options: Any
) -> _Chart:
    return _Chart(name, shows, panels, draw_dots, {"unit": unit, **options})


def _lines(
    name: str, shows: str, panels: Mapping[str, Mapping[str, Line]], **options: Any
) -> _Chart:
    return _Chart(name, shows, panels, draw_lines, options)


# --- the experiments -----------------------------------------------------------------------------


def _operations(result: Result) -> Iterator[_Chart]:
    for size in dict.fromkeys(row["value_size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["value_size"] == size]
        shows = f"Time of an operation, values of {size:,} bytes, {rows[0]['records']:,} records"
        yield _dots(f"operations-{size}", shows, _by_operation(rows), _MICROSECONDS)


def _million(result: Result) -> Iterator[_Chart]:
    for size in dict.fromkeys(row["value_size"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["value_size"] == size]
        shows = f"Time of an operation, values of {size:,} bytes, {rows[0]['records']:,} records"
        yield _dots(f"million-{size}", shows, _by_operation(rows), _MICROSECONDS)


def _dataset(result: Result) -> Iterator[_Chart]:
    shows = f"Time of an operation with real data, {result['rows'][0]['records']:,} cities"
    yield _dots("dataset", shows, _by_operation(result["rows"]), _MICROSECONDS)


def _mixes(result: Result) -> Iterator[_Chart]:
    shows = f"Time of an operation in mixes of them, values of {result['value_size']:,} bytes"
    panels = {
        f"{row['mix']}: {row['share_of_reads']:.0%} reads": _ranges(row["microseconds"])
        for row in result["rows"]
    }
    yield _dots("mixes", shows, panels, _MICROSECONDS)


def _growth(result: Result) -> Iterator[_Chart]:
    shows = f"Time of an operation in a store of so many records of {result['value_size']:,} bytes"
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {
        title: {} for title in _GROWTH_PANELS.values()
    }
    for row in result["rows"]:
        for operation, title in _GROWTH_PANELS.items():
            line = panels[title].setdefault(row["engine"], [])
            line.append((row["records"], row["microseconds"][operation]["median"]))
    yield _lines("growth", shows, panels, labels=("records", "µs"))


def _latency(result: Result) -> Iterator[_Chart]:
    shows = f"How long single operations take while a store grows to {result['records']:,} records"
    share = (
        "share of operations that take no longer (the last mark of a line is the longest of all)"
    )
    panels = {
        operation: {
            engine: _percentiles(seen["histograms"][operation])
            for engine, seen in result["engines"].items()
        }
        for operation in ("create", "read")
    }
    yield _lines("latency", shows, panels, labels=(share, "µs"), ticks=_SHARE_TICKS, columns=1)


def _percentiles(stored: Any) -> Line:
    """Return the percentiles as a line to the longest: at 10 what 1 of 10 exceeds, and so on."""
    histogram = Histogram.from_json(stored)
    shares = [share for share in _SHARES if 1 / (1 - share) < histogram.total]
    line = [(1 / (1 - share), histogram.percentile(share) / 1000) for share in shares]
    return [*line, (histogram.total, histogram.largest / 1000)]


def _threads(result: Result) -> Iterator[_Chart]:
    shows = f"Throughput of threads together, values of {result['value_size']:,} bytes"
    panels: dict[str, dict[str, Line]] = {}
    for row in result["rows"]:
        panels.setdefault(row["load"], {})[row["engine"]] = [
            (int(threads), figures["median"])
            for threads, figures in row["operations_per_second"].items()
        ]
    labels = ("threads", "operations a second")
    yield _lines("threads", shows, panels, labels=labels, columns=len(panels))


def _durable(result: Result) -> Iterator[_Chart]:
    panels: dict[str, dict[str, Range]] = {}
    for row in result["rows"]:
        for threads, figures in row["operations_per_second"].items():
            name = f"{row['operation']}, {threads} thread{'s' * (threads != '1')}"
            panels.setdefault(name, {})[row["engine"]] = _range(figures)
    shows = "Throughput of operations that are on stable storage"
    yield _dots("durable", shows, panels, "a second: median and extremes", more_is_better=True)


def _memory(result: Result) -> Iterator[_Chart]:
    shows = "Private memory: what an import adds, and with records of 100 bytes in the store"
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
    yield _dots("memory", shows, panels, "MiB")


def _limited(result: Result) -> Iterator[_Chart]:
    limit = result["limit_bytes"] // _MEBIBYTE
    shows = f"Throughput in {limit} MiB of memory, of those that lived"
    panels = {
        f"{task}s": {
            engine: _single(each[task]["count"] / each[task]["seconds"])
            for engine, each in result["engines"].items()
            if each.get(task, {}).get("outcome") == "fine"
        }
        for task in ("create", "read")
    }
    yield _dots("limited", shows, panels, "operations a second", more_is_better=True)


def _opening(result: Result) -> Iterator[_Chart]:
    shows = f"Time to open a store of up to {result['records']:,} records"
    engines = result["engines"]
    whole = [
        name
        for name, each in engines.items()
        if "came_back" in each and each["came_back"] == each["records"]
    ]
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
    yield _dots("opening", shows, panels, "ms: median and extremes")


def _space(result: Result) -> Iterator[_Chart]:
    panels = {
        f"{int(kind):,} B" if kind.isdecimal() else f"{kind}, {stored:.0f} B": {
            engine: _single(each[kind]["bytes_per_record"])
            for engine, each in result["engines"].items()
            if kind in each
        }
        for kind, stored in result["key_and_value_bytes"].items()
    }
    yield _dots("space", "Space in the file for each record, by its value", panels, "bytes")


_CHARTS: Final[dict[str, Callable[[Result], Iterable[_Chart]]]] = {
    "operations": _operations,
    "million": _million,
    "dataset": _dataset,
    "mixes": _mixes,
    "growth": _growth,
    "latency": _latency,
    "threads": _threads,
    "durable": _durable,
    "memory": _memory,
    "limited": _limited,
    "opening": _opening,
    "space": _space,
}


# --- figures -------------------------------------------------------------------------------------


def _by_operation(rows: Iterable[Result]) -> dict[str, dict[str, Range]]:
    return {row["operation"]: _ranges(row["microseconds"]) for row in rows}


def _ranges(by_engine: Mapping[str, Mapping[str, float]]) -> dict[str, Range]:
    return {engine: _range(figures) for engine, figures in by_engine.items()}


def _range(figures: Mapping[str, float], factor: float = 1) -> Range:
    return Range(*(figures[name] * factor for name in ("median", "min", "max")))


def _single(figure: float) -> Range:
    return Range(figure, figure, figure)
