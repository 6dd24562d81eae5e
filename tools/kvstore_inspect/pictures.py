"""The report's pictures, as SVG whose lines and letters take the colour of the text around them."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import Any, Final

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kvstore.layout import KIND_FIXED, KIND_FREE, KIND_SEGMENT, KIND_SLAB

from .survey import NEVER, Survey

# What no picture has otherwise; in the page it becomes the colour of the text.
_TEXT: Final = "#010203"
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvstore",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
# Each tells from its neighbours also without colour, by how light it is.
KIND_COLOURS: Final = {
    KIND_FREE: ("free", "#b8c0cc"),
    KIND_FIXED: ("superblock, directory, extent map", "#4c4f69"),
    KIND_SEGMENT: ("segments of the table", "#d97706"),
    KIND_SLAB: ("records", "#2563eb"),
}
_DAMAGED: Final = "#dc2626"
_LIFETIMES: Final = {
    0: "expired",
    60: "<1 min",
    3_600: "<1 h",
    86_400: "<1 day",
    7 * 86_400: "<1 week",
    30 * 86_400: "<30 days",
    365 * 86_400: "<1 year",
    inf: "longer",
    NEVER: "never",
}


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words."""

    title: str
    caption: str
    svg: str


def pictures(survey: Survey) -> list[Picture]:
    """Draw all pictures of a report."""
    drawn = [
        _draw(
            "Map of the file",
            "Every extent of 64 KiB, row by row from the start of the file. The fuller an extent, "
            "the stronger its colour.",
            lambda axes: _map(axes, survey),
            height=3.4,
        ),
        _draw(
            "Value sizes",
            "Records by the size of their values as JSON, each bar twice as wide as the one "
            "before it.",
            lambda axes: _value_sizes(axes, survey),
        ),
        _draw(
            "Space by size class",
            "Each record lies in a block of the next larger size class. What it does not fill is "
            "padding; blocks without a record are free for others of the same class.",
            lambda axes: _classes(axes, survey),
        ),
        _draw(
            "Expiry over time",
            "How long the records have to live.",
            lambda axes: _lifetimes(axes, survey),
        ),
    ]
    if survey.by_index:
        drawn += [
            _draw(
                "Load of the segments",
                "Segments of the hash table by the share of their 1,280 slots that is in use. At "
                "7/8 a segment is split in two.",
                lambda axes: _loads(axes, survey),
            ),
            _draw(
                "Probe lengths",
                "Records by the pages of the table that finding them takes. One is the rule.",
                lambda axes: _probes(axes, survey),
            ),
        ]
    return drawn


def _draw(title: str, caption: str, fill: Callable[[Any], object], height: float = 2.6) -> Picture:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        fill(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return Picture(title, caption, _inlined(written.getvalue(), title))


def _inlined(svg: str, title: str) -> str:
    """Make an SVG document part of a page: without a head, with names that are its own."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(_TEXT, "currentColor")
    return re.sub(
        r"<svg ([^>]*?)>",
        lambda found: (
            f'<svg role="img" aria-label="{title}" '
            + re.sub(r'(width|height)="[^"]*" ?', "", found[1])
            + ">"
        ),
        svg,
        count=1,
    )


def _map(axes: Any, survey: Survey) -> None:
    columns = max(8, ceil(sqrt(len(survey.extents) * 1.5)))
    rows = ceil(len(survey.extents) / columns)
    pixels = [[(0.0, 0.0, 0.0, 0.0)] * columns for _ in range(rows)]
    for number, extent in enumerate(survey.extents):
        _, colour = KIND_COLOURS.get(extent.kind, ("", _DAMAGED))
        strength = 0.35 + 0.65 * extent.fill if extent.kind != KIND_FREE else 0.45
        pixels[number // columns][number % columns] = (*to_rgb(colour), strength)
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    names = [*KIND_COLOURS.values()]
    if any(extent.kind not in KIND_COLOURS for extent in survey.extents):
        names.append(("damaged", _DAMAGED))
    handles = [
        mpl.patches.Patch(color=colour, label=f"{name}: {_kind_count(survey, name):,}")
        for name, colour in names
    ]
    axes.figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8)


def _kind_count(survey: Survey, name: str) -> int:
    kinds = [kind for kind, (each, _) in KIND_COLOURS.items() if each == name]
    if kinds:
        return survey.count(kinds[0])
    return sum(extent.kind not in KIND_COLOURS for extent in survey.extents)


def _bars(
    axes: Any, labels: Sequence[str], counts: Sequence[int], colour: str, *, slanted: bool = False
) -> None:
    axes.bar(labels, counts, color=colour)
    axes.set_ylabel("records")
    axes.yaxis.set_major_formatter(lambda number, _place: _short(number))
    if slanted:
        axes.tick_params(axis="x", rotation=45)


def _value_sizes(axes: Any, survey: Survey) -> None:
    bounds = [2**power for power in range(4, 15)]
    counts = [0] * len(bounds)
    for size, count in survey.value_sizes.items():
        counts[next(i for i, bound in enumerate(bounds) if size <= bound)] += count
    _bars(axes, [f"≤{bound:,}" for bound in bounds], counts, "#2563eb", slanted=True)
    axes.set_xlabel("bytes of JSON")


def _classes(axes: Any, survey: Survey) -> None:
    used = [each for each in survey.classes if each.extents or each.records]
    labels = [f"{each.block_size:,}" for each in used]
    bottoms = [0.0] * len(used)
    for name, colour, values in (
        ("records", "#2563eb", [each.record_bytes for each in used]),
        ("padding", "#d97706", [each.padding for each in used]),
        ("free", "#b8c0cc", [max(0, each.free) for each in used]),
    ):
        axes.bar(labels, values, bottom=bottoms, label=name, color=colour)
        bottoms = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_xlabel("bytes of a block")
    step = ceil(len(labels) / 12) or 1
    axes.set_xticks(range(0, len(labels), step), labels[::step], rotation=45)
    if used:
        axes.legend(frameon=False, fontsize=8)


def _lifetimes(axes: Any, survey: Survey) -> None:
    counts = [survey.lifetimes[limit] for limit in _LIFETIMES]
    _bars(axes, [*_LIFETIMES.values()], counts, "#0d9488", slanted=True)


def _loads(axes: Any, survey: Survey) -> None:
    axes.hist(survey.loads, bins=[step / 20 for step in range(21)], color="#d97706")
    axes.axvline(7 / 8, color=_TEXT, linestyle=":", linewidth=1)
    axes.xaxis.set_major_formatter(lambda share, _place: f"{share:.0%}")
    axes.set_xlabel("slots in use")
    axes.set_ylabel("segments")


def _probes(axes: Any, survey: Survey) -> None:
    longest = max(survey.probes, default=1)
    pages = range(1, max(longest, 3) + 1)
    _bars(axes, [str(page) for page in pages], [survey.probes[page] for page in pages], "#d97706")
    axes.set_xlabel("pages")


def _short(number: float) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
