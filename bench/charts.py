"""The charts of the report, as SVG files whose bytes depend on the figures alone.

Two kinds are enough: a dot for each engine in a row of its own, and a line for each. All scales are
logarithmic, so that twice as much is as far anywhere. Colours are those of Okabe and Ito, which the
colour-blind can tell apart; lines differ by dashes and marks too. The background is opaque, as the
page around it may be light or dark.
"""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from statistics import fmean
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from engines import ENGINES
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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


class Range(NamedTuple):
    """A figure, and its extremes over some rounds."""

    median: float
    least: float
    most: float


Line = Sequence[tuple[float, float]]


def draw_dots(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Range]],
    unit: str,
    *,
    more_is_better: bool = False,
) -> None:
    """Draw a row for each engine, the best above, and a panel for each kind of figure.

    Args:
        path: the file to write.
        title: what stands above.
        panels: figures by engine, by what they are of; an engine may lack some of them.
        unit: of the figures.
        more_is_better: which is the best.
    """
    engines = _by_rank(panels, more_is_better)
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
        _write_heading(figure, f"{title} ({unit})", height)
        _save(figure, path)


def _by_rank(panels: Mapping[str, Mapping[str, Range]], more_is_better: bool) -> list[str]:
    """Return all engines, by the mean of their figures' logarithms; last those that lack some."""
    logarithms: dict[str, list[float]] = {}
    for figures in panels.values():
        for engine, figure in figures.items():
            logarithms.setdefault(engine, []).append(log10(figure.median))
    sign = -1 if more_is_better else 1

    def rank(engine: str) -> tuple[int, float]:
        return -len(logarithms[engine]), sign * fmean(logarithms[engine])

    return sorted(logarithms, key=rank)


def _draw_panel_of_dots(axes: Axes, engines: Sequence[str], figures: Mapping[str, Range]) -> None:
    axes.set_xscale("log")
    for is_own in (False, True):
        rows = [
            (place, figures[engine])
            for place, engine in enumerate(engines)
            if engine in figures and _is_own(engine) is is_own
        ]
        if not rows:
            continue
        places = [place for place, _ in rows]
        colour = _OWN_COLOUR if is_own else _DOT_COLOUR
        medians, least, most = zip(*(figure for _, figure in rows), strict=True)
        axes.hlines(places, least, most, color=colour, linewidth=1.4)
        axes.plot(medians, places, "o", color=colour, markersize=6.5 if is_own else 5)
        for place, figure in rows:
            axes.text(
                1.0, place, show_number(figure.median), transform=axes.get_yaxis_transform(),
                ha="right", va="center", color=colour,
                fontweight="bold" if is_own else "normal",
            )  # fmt: skip
    if OWN in figures:
        axes.axvline(figures[OWN].median, color=_OWN_COLOUR, linewidth=0.8, alpha=0.6, zorder=0)
    low = min(each.least for each in figures.values())
    high = max(each.most for each in figures.values())
    decades = max(log10(high / low), 0.3)
    # What is on the right of the figures is for the numbers.
    axes.set_xlim(low / 10 ** (0.07 * decades), low * 10 ** (1.55 * decades))
    axes.set_ylim(len(engines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _set_log_ticks(axes.xaxis, low, low * 10**decades)


def draw_lines(
    path: Path,
    title: str,
    panels: Mapping[str, Mapping[str, Line]],
    labels: tuple[str, str],
    ticks: Mapping[float, str] | None = None,
    columns: int = 2,
) -> None:
    """Draw a line for each engine, in a panel for each kind of figure; a legend for all below.

    Args:
        path: the file to write.
        title: what stands above.
        panels: lines by engine, by what they are of.
        labels: of the axes, x and y.
        ticks: what to write at which x; None: at each x of the lines, the number.
        columns: how many panels are side by side.
    """
    engines = list(dict.fromkeys(engine for lines in panels.values() for engine in lines))
    if ticks is None:
        every = sorted({x for lines in panels.values() for line in lines.values() for x, _ in line})
        ticks = {x: show_number(x) for x in every}
    rows = ceil(len(panels) / columns)
    legend_rows = ceil(len(engines) / 6)
    height = 0.95 + (2.15 if rows > 1 else 3.0) * rows + 0.22 * legend_rows
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height))
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(name, loc="left", pad=4)
            _draw_panel_of_lines(axes, lines, ticks)
        for axes in grid[-1]:
            axes.set_xlabel(labels[0])
        for axes in grid[:, 0]:
            axes.set_ylabel(labels[1])
        figure.subplots_adjust(
            left=0.72 / _WIDTH, right=1 - 0.15 / _WIDTH, top=1 - 0.55 / height,
            bottom=(0.55 + 0.22 * legend_rows) / height, wspace=0.08 * columns, hspace=0.24,
        )  # fmt: skip
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=6, columnspacing=1.2)
        _write_heading(figure, title, height)
        _save(figure, path)


def _draw_panel_of_lines(axes: Axes, lines: Mapping[str, Line], ticks: Mapping[float, str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for engine, line in lines.items():
        x, y = zip(*line, strict=True)
        axes.plot(x, y, label=engine, markersize=3.5, **_style_of(engine))
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ticks.get(x, "")))
    figures = [y for line in lines.values() for _, y in line]
    _set_log_ticks(axes.yaxis, min(figures), max(figures))


def _is_own(engine: str) -> bool:
    return engine.startswith(OWN)


def _style_of(engine: str) -> dict[str, Any]:
    """Return how the line of an engine looks, the same in all charts."""
    order = [name for name in ENGINES if _is_own(name) == _is_own(engine)]
    place = order.index(engine) if engine in order else len(order)
    if _is_own(engine):
        return {
            "color": _OWN_COLOUR,
            "linewidth": 2.8,
            "linestyle": _DASHES[place % len(_DASHES)],
            "marker": "o",
            "zorder": 5,
        }
    lap, place = divmod(place, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "linewidth": 1.3,
        "linestyle": _DASHES[lap % len(_DASHES)],
        "marker": _MARKS[(place + lap) % len(_MARKS)],
    }


def _set_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Have ticks at 1, 10, 100, … from `low` to `high`; where these are few, between them too."""
    decades = log10(high / low)
    parts = (1, 2, 5) if decades < 1 else (1, 3) if decades < 1.6 else (1,)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    ticks = [part * 10.0**power for power in powers for part in parts]
    axis.set_major_locator(
        FixedLocator([tick for tick in ticks if low * 0.9 <= tick <= high * 1.1])
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: show_number(number)))


def show_number(number: float) -> str:
    """Return a number as short as it can be read: three digits, then k or M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit * 0.9995:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.3g}" if number < 99.95 else f"{number:.0f}"


def _write_heading(figure: Figure, title: str, height: float) -> None:
    figure.text(
        0.12 / _WIDTH, 1 - 0.1 / height, title, ha="left", va="top", fontsize=10.5,
        fontweight="bold",
    )  # fmt: skip


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
