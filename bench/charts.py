"""The five charts of the report, as SVG files whose bytes depend on the figures alone.

Two kinds are enough: a dot for each engine in a row of its own, and a line for each. All scales are
logarithmic, so that twice as much is as far anywhere. Colours are those of Okabe and Ito, which the
colour-blind can tell apart; lines differ by dashes and marks too. The background is opaque, as the
page around it may be light or dark.
"""

from collections.abc import Mapping, Sequence
from math import ceil, log10
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import matplotlib as mpl
from engines import ENGINES
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from operations import OPERATIONS, typical_case
from records import SHAPES, WORDS

OWN: Final = "kvstore"

_WIDTH: Final = 8.34  # inches of 72 points, which are 800 pixels
_OWN_COLOUR: Final = "#d55e00"
_DOT_COLOUR: Final = "#4d6a85"
_COLOURS: Final = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
_DASHES: Final = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_MARKS: Final = "osD^vP"
_PAPER: Final = "#f7f7f5"
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",  # letters stay letters: small files, sharp at any size
    "svg.hashsalt": "kvstore",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # each letter's style names all of them
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": _PAPER,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": _PAPER,
    "grid.color": "#dcdcd8",
    "grid.linewidth": 0.6,
    "text.color": "#222222",
    "legend.frameon": False,
}


Result = Mapping[str, Any]
Spread = Mapping[str, float]
# Of some engines, by what they are of.
Dots = Mapping[str, Mapping[str, Spread]]
Lines = dict[str, dict[str, list[tuple[float, float]]]]
# Where percentiles are on the axis of `latency`.
SHARES: Final = {"p50": 2, "p90": 10, "p99": 100, "p99.9": 1e3, "p99.99": 1e4, "max": 1e6}


def draw_dots(path: Path, title: str, panels: Dots) -> None:
    """Draw a row for each engine, the best above, and a panel for each kind of figure."""
    panels = {name: figures for name, figures in panels.items() if figures}
    ranks: dict[str, list[float]] = {}
    for figures in panels.values():
        for engine, spread in figures.items():
            ranks.setdefault(engine, []).append(log10(spread["median"]))
    engines = sorted(ranks, key=lambda name: (-len(ranks[name]), fmean(ranks[name])))
    height = 0.95 + 0.235 * len(engines)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height))
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, figures) in zip(row, panels.items(), strict=True):
            _draw_panel_of_dots(axes, engines, figures)
            axes.set_title(name, loc="left", pad=4)
        row[0].set_yticks(range(len(engines)), engines)
        for label in row[0].get_yticklabels():
            if _is_own(label.get_text()):
                label.set(color=_OWN_COLOUR, fontweight="bold")
        figure.subplots_adjust(
            left=1.15 / _WIDTH, right=1 - 0.12 / _WIDTH, top=1 - 0.52 / height,
            bottom=0.42 / height, wspace=0.09,
        )  # fmt: skip
        _save(figure, path, title, height)


def _draw_panel_of_dots(axes: Axes, engines: Sequence[str], figures: Mapping[str, Spread]) -> None:
    axes.set_xscale("log")
    for place, engine in enumerate(engines):
        if engine not in figures:
            continue
        figure = figures[engine]
        colour, weight = (_OWN_COLOUR, "bold") if _is_own(engine) else (_DOT_COLOUR, "normal")
        axes.hlines(place, figure["min"], figure["max"], color=colour, linewidth=1.4)
        axes.plot(figure["median"], place, "o", color=colour, markersize=5.5)
        axes.text(
            1.0, place, show_number(figure["median"]), transform=axes.get_yaxis_transform(),
            ha="right", va="center", color=colour, fontweight=weight,
        )  # fmt: skip
    low = min(each["min"] for each in figures.values())
    high = max(each["max"] for each in figures.values())
    decades = max(log10(high / low), 0.3)
    # What is on the right of the figures is for the numbers.
    axes.set_xlim(low / 10 ** (0.07 * decades), low * 10 ** (1.55 * decades))
    axes.set_ylim(len(engines) - 0.4, -0.6)
    if OWN in figures:
        axes.axvline(figures[OWN]["median"], color=_OWN_COLOUR, linewidth=0.8, alpha=0.6, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _set_log_ticks(axes.xaxis, low, low * 10**decades)


def draw_lines(path: Path, title: str, panels: Lines, names: Mapping[float, str]) -> None:
    """Draw a line for each engine, in a panel for each kind of figure; a legend for all below."""
    rows = len(panels) // 2
    lines_of_all = [line for lines in panels.values() for line in lines.values()]
    ticks = {x: names.get(x) or show_number(x) for line in lines_of_all for x, _ in line}
    legend = 0.22 * ceil(len(lines_of_all) / len(panels) / 6)
    height = 0.9 + 2.5 * rows + legend
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height))
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False)
        for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(name, loc="left", pad=4)
            axes.set(xscale="log", yscale="log")
            for engine, line in lines.items():
                axes.plot(*zip(*line, strict=True), label=engine, **_style_of(engine))
            axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks.get(x, "")))
            figures = [y for line in lines.values() for _, y in line]
            _set_log_ticks(axes.yaxis, min(figures), max(figures))
        figure.subplots_adjust(
            left=0.5 / _WIDTH, right=1 - 0.15 / _WIDTH, top=1 - 0.55 / height,
            bottom=(0.35 + legend) / height, wspace=0.2, hspace=0.24,
        )  # fmt: skip
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="lower center", ncols=6, columnspacing=1.2
        )
        _save(figure, path, title, height)


def _is_own(engine: str) -> bool:
    return engine.startswith(OWN)


def _style_of(engine: str) -> dict[str, Any]:
    """Return how the line of an engine looks, the same in all charts."""
    place = list(ENGINES).index(engine)
    lap, colour = divmod(place, len(_COLOURS))
    style = {"linestyle": _DASHES[lap], "marker": _MARKS[colour], "markersize": 3.5}
    if _is_own(engine):
        dashes = _DASHES[engine != OWN]
        return style | {"color": _OWN_COLOUR, "linewidth": 2.8, "zorder": 5, "linestyle": dashes}
    return style | {"color": _COLOURS[colour], "linewidth": 1.3}


def _set_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Have ticks at 1, 10, 100, … from `low` to `high`; where these are few, between them too."""
    decades = log10(high / low)
    parts = (1, 2, 5) if decades < 1 else (1, 3) if decades < 1.6 else (1,)
    axis.set_major_locator(LogLocator(subs=parts))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: show_number(number)))


def show_number(number: float) -> str:
    """Return a number as short as it can be read: three digits, then k or M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}" if number < 99.95 else f"{number:.0f}"


def _save(figure: Figure, path: Path, title: str, height: float) -> None:
    place = (0.12 / _WIDTH, 1 - 0.1 / height)
    figure.text(*place, title, ha="left", va="top", fontsize=10.5, fontweight="bold")
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _values(result: Result) -> Dots:
    return {
        f"{size:,} B, {'words' if shape == WORDS else 'string'}": figures["create"]
        for size in (1000, 16_000)
        for shape in SHAPES
        if (figures := typical_case(result, size, shape))
    }


def _growth(result: Result) -> Lines:
    panels: Lines = {operation: {} for operation in OPERATIONS}
    for case in result["cases"]:
        if (case["size"], case["shape"]) == (100, WORDS):
            for operation, figures in case["microseconds"].items():
                for engine, figure in figures.items():
                    point = (case["records"], figure["median"])
                    panels[operation].setdefault(engine, []).append(point)
    return panels


def _latency(result: Result) -> Lines:
    return {
        timed: {
            engine: [
                (SHARES[name], each["median"]) for name, each in row["microseconds"][timed].items()
            ]
            for engine, row in result["engines"].items()
        }
        for timed in ("create", "read")
    }


def _footprint(result: Result) -> Dots:
    panels: dict[str, dict[str, Spread]] = {}
    for engine, row in result["engines"].items():
        figures = {
            "bytes a record": row.get("bytes_per_record", {}).get("100"),
            "memory, MiB": row.get("late_bytes", 0) / (1 << 20),
        }
        for name, figure in figures.items():
            if figure:
                single = dict.fromkeys(("median", "min", "max"), figure)
                panels.setdefault(name, {})[engine] = single
        all_came_back = row.get("came_back") == row.get("records")
        for name, how in (("opening, ms", "closed"), ("after SIGKILL, ms", "killed")):
            if how in row and (all_came_back or how == "closed"):
                panels.setdefault(name, {})[engine] = row[how]
    return panels


def draw_all(results: Mapping[str, Result], folder: Path) -> dict[str, str]:
    """Draw the charts of these experiments; return what each shows, by the name of its file.

    Others are removed from the folder.
    """
    drawn: dict[str, str] = {}

    def name(chart: str, shows: str) -> tuple[Path, str]:
        drawn[f"{chart}.svg"] = shows
        return folder / f"{chart}.svg", shows

    if result := results.get("operations"):
        figures = typical_case(result, 100)
        draw_dots(*name("operations-100", "µs an operation, values of 100 bytes"), figures)
        draw_dots(
            *name("values", "µs to create larger values, of words or one string"), _values(result)
        )
        title = "µs an operation in stores of so many records"
        draw_lines(*name("growth", title), _growth(result), {})
    if result := results.get("latency"):
        title = "µs that so large a share of operations does not exceed"
        names = {place: share for share, place in SHARES.items()}
        draw_lines(*name("latency", title), _latency(result), names)
    if result := results.get("footprint"):
        title = "A store of up to 1,000,000 records of 100 bytes"
        draw_dots(*name("footprint", title), _footprint(result))
    for path in folder.glob("*.svg"):
        if path.name not in drawn:
            path.unlink()
    return drawn
