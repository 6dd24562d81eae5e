"""The report's pictures, as SVG whose lines and letters take the colour of the text around them.

They are as wide as a phone: there a point is a pixel, and no letter is smaller than 11 of them.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kvstore.format.layout import KIND_FIXED, KIND_FREE, KIND_SEGMENT, KIND_SLAB

from .survey import DAMAGED_KIND, NO_TTL, SizeClass, Survey, extents

# What no picture has otherwise; in the page it becomes the colour of the text.
_TEXT: Final = "#010203"
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvstore",
    "font.size": 11,
    "axes.labelsize": 11,
    "legend.fontsize": 11,
    "font.family": "sans-serif",
    "text.color": _TEXT,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
# Each tells from its neighbours also without colour, by how light it is, and from either page.
KIND_COLOURS: Final = {
    KIND_FREE: ("free", "#b8c0cc"),
    KIND_FIXED: ("superblock, directory, map", "#6e7681"),
    KIND_SEGMENT: ("segments of the table", "#d97706"),
    KIND_SLAB: ("records", "#2563eb"),
    DAMAGED_KIND: ("damaged", "#dc2626"),
}
_LIFETIMES: Final = {
    0: "expired",
    60: "<1 min",
    3_600: "<1 h",
    86_400: "<1 day",
    7 * 86_400: "<1 week",
    30 * 86_400: "<30 days",
    365 * 86_400: "<1 year",
    inf: "longer",
    NO_TTL: "never",
}


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows in words."""

    title: str
    caption: str
    svg: str


class _Drawing(NamedTuple):
    """A picture to be: what it shows, and the function that fills its axes."""

    title: str
    caption: str
    fill: Callable[[Any, Survey], object]
    height: float = 3.2  # inches


def pictures(survey: Survey) -> list[Picture]:
    """Draw all pictures of a report."""
    shown = (*_PICTURES, *_OF_THE_TABLE) if survey.by_index else _PICTURES
    return [_draw(each, survey) for each in shown]


def _draw(drawing: _Drawing, survey: Survey) -> Picture:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.15, drawing.height), layout="constrained")
        FigureCanvasSVG(figure)
        drawing.fill(figure.subplots(), survey)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return Picture(drawing.title, drawing.caption, _inlined(written.getvalue(), drawing.title))


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
    shown = extents(survey.view)
    columns = max(8, ceil(sqrt(len(shown) * 1.5)))
    rows = ceil(len(shown) / columns)
    pixels = [[(0.0, 0.0, 0.0, 0.0)] * columns for _ in range(rows)]
    for number, extent in enumerate(shown):
        pixels[number // columns][number % columns] = _shade(extent.kind, extent.fill)
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    counts = Counter(extent.kind for extent in shown)
    handles = [
        mpl.patches.Patch(color=_shade(kind), label=f"{name}: {counts[kind]:,} extents")
        for kind, (name, _) in KIND_COLOURS.items()
        if counts[kind] or kind != DAMAGED_KIND
    ]
    axes.figure.legend(handles=handles, loc="outside lower left", frameon=False)


def _shade(kind: int, fill: float = 1.0) -> tuple[float, float, float, float]:
    """Return the colour of an extent: the stronger the fuller, and faint where it is free."""
    return *to_rgb(KIND_COLOURS[kind][1]), 0.25 if kind == KIND_FREE else 0.35 + 0.65 * fill


def _bars(
    axes: Any, labels: Sequence[str], counts: Sequence[int], colour: str | Sequence[str]
) -> None:
    bars = axes.barh(labels, counts, color=colour)
    _label(axes, bars, counts, _short)


def _label(axes: Any, bars: Any, lengths: Sequence[float], shown: Callable[[float], str]) -> None:
    """Write at the end of each bar how long it is; the first is at the top."""
    axes.bar_label(bars, [shown(each) if each else "" for each in lengths], padding=3)
    longest = max(lengths, default=0)
    axes.set_xlim(0, longest * 1.2 or 1)
    axes.set_xticks([])
    axes.invert_yaxis()
    if not longest:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")


def _value_sizes(axes: Any, survey: Survey) -> None:
    bounds = [2**power for power in range(4, 15)]
    counts = [0] * len(bounds)
    for size, count in survey.value_sizes.items():
        counts[next(i for i, bound in enumerate(bounds) if size <= bound)] += count
    _bars(axes, [f"≤{bound:,}" for bound in bounds], counts, "#2563eb")
    axes.set_ylabel("bytes of JSON")
    axes.set_xlabel("records")


def _classes(axes: Any, survey: Survey) -> None:
    groups: dict[int, list[SizeClass]] = {}
    for each in survey.used_classes:
        groups.setdefault(_doubling(each.block_size), []).append(each)
    parts = (
        ("records", "#2563eb", lambda each: each.record_size),
        ("padding", "#d97706", lambda each: each.padding_size),
        ("expired", "#8b5cf6", lambda each: each.expired_size),
        ("retired", "#0d9488", lambda each: each.retired_size),
        ("free", "#b8c0cc", lambda each: each.free_size),
    )
    lengths = [[sum(map(measure, group)) for group in groups.values()] for _, _, measure in parts]
    totals = [sum(column) for column in zip(*lengths, strict=True)]
    divisor, unit = _unit(max(totals, default=0))
    labels = [f"≤{bound:,}" for bound in groups]
    ends = [0.0] * len(groups)
    bars = None
    for (name, colour, _), row in zip(parts, lengths, strict=True):
        scaled = [each / divisor for each in row]
        bars = axes.barh(labels, scaled, left=ends, label=name, color=colour)
        ends = [end + each for end, each in zip(ends, scaled, strict=True)]
    _label(axes, bars, ends, lambda length: f"{length:.3g}")
    axes.set_ylabel("bytes of a block")
    if groups:
        axes.set_xlabel(unit)
        axes.figure.legend(loc="outside upper left", ncols=3, columnspacing=1, frameon=False)
    else:
        axes.set_yticks([])


def _doubling(size: int) -> int:
    """Return the first power of two that is not less."""
    return 1 << (size - 1).bit_length()


def _unit(size: float) -> tuple[int, str]:
    """Return a unit in which this many bytes are a number that can be read, and its name."""
    for divisor, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= divisor:
            return divisor, name
    return 1, "B"


def _lifetimes(axes: Any, survey: Survey) -> None:
    counts = [survey.lifetimes[limit] for limit in _LIFETIMES]
    colours = ["#0d9488" if limit else "#8b95a3" for limit in _LIFETIMES]
    _bars(axes, [*_LIFETIMES.values()], counts, colours)
    axes.set_xlabel("records")


def _loads(axes: Any, survey: Survey) -> None:
    loads = [extent.fill for extent in extents(survey.view) if extent.kind == KIND_SEGMENT]
    tenths = Counter(min(int(load * 10), 9) for load in loads)
    labels = [f"{10 * tenth}–{10 * tenth + 10}%" for tenth in range(10)]
    _bars(axes, labels, [tenths[tenth] for tenth in range(10)], "#d97706")
    axes.set_ylabel("slots in use")
    axes.set_xlabel("segments")


def _probes(axes: Any, survey: Survey) -> None:
    longest = max(survey.probes, default=1)
    pages = range(1, max(longest, 3) + 1)
    _bars(axes, [str(page) for page in pages], [survey.probes[page] for page in pages], "#d97706")
    axes.set_ylabel("pages")
    axes.set_xlabel("records")


def _short(number: float) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


_PICTURES: Final = (
    _Drawing(
        "Map of the file",
        "Every extent of 64 KiB, row by row from the start of the file. The fuller an extent, "
        "the stronger its colour.",
        _map,
        height=3.4,
    ),
    _Drawing(
        "Value sizes",
        "Records by the size of their values as JSON. Each bar reaches to twice the size of "
        "the one before it. What has expired is left out.",
        _value_sizes,
    ),
    _Drawing(
        "Space by size class",
        "Each record lies in a block of the next larger size class. What it does not fill is "
        "padding; what is retired was superseded or deleted, and is not yet free; blocks without a "
        "record are free for others of the same class. Classes are shown together up to each "
        "doubling.",
        _classes,
    ),
    _Drawing(
        "Expiry over time",
        "How long the records have to live; in grey those that have expired and were not yet "
        "taken back.",
        _lifetimes,
    ),
)
_OF_THE_TABLE: Final = (
    _Drawing(
        "Load of the segments",
        "Segments of the hash table by the share of their 1,280 slots that is in use, by "
        "what has expired too. At 7/8 (88%) a segment is split in two.",
        _loads,
    ),
    _Drawing(
        "Probe lengths",
        "Records by the pages of the table that finding them takes. One is the rule. What "
        "has expired is left out.",
        _probes,
        height=1.8,
    ),
)
