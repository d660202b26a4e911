"""Drawings as inline SVG, legible at a phone's width. What is drawn, and what is said of it, is left to the callers.

Every figure is about as wide as a phone; the page puts several side by side where there is room. Text stays text, in
the page's own font: it can be searched and read at any size. Names and words from data are never read as mathematics.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from pipelines.report.calibration import Reliability
from pipelines.terminal import printable

COLOURS = {"teacher": "#0b5cad", "student": "#c2410c", "undistilled": "#6b7280"}
"""The same on the whole page, and told apart without colour vision too."""
INK, FAINT = "#1f2933", "#d5dbe1"
SERIES = ("#1f2933", "#0f766e", "#7c3aed", "#b45309", "#be185d", "#4d7c0f")
WIDTH = 4.0
"""Inches of a figure; its text is 8.5 points."""
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=SERIES),
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
MOST_NUMBERS = 12
"""Classes of a confusion matrix whose cells have numbers in them."""
MOST_NAMES = 16
"""Classes of a confusion matrix that are named on its axes; of more, letters could not be read on a phone."""
MOST_VECTOR_POINTS = 1500
"""Points of a scatter drawn as shapes; more are drawn as one picture inside the SVG."""

Points = Mapping[int, float]


def cut(text: str, length: int) -> str:
    """A name short enough for an axis, control characters spelt out."""
    text = printable(text).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= length else text[: length - 1] + "…"


def draw(name: str, alt: str, height: float, paint: Callable[[Axes], None], width: float = WIDTH) -> str:
    """One pair of axes, painted; SVG to put into a page.

    Args:
        name: no other drawing of the page has it: names of shapes inside are made from it.
        alt: what a screen reader says.
    """
    with _style(name):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        paint(canvas.subplots())
        return _svg(canvas, alt)


@contextmanager
def _style(name: str) -> Any:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _svg(canvas: Canvas, alt: str) -> str:
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(out, format="svg", transparent=True, dpi=200, metadata=nothing)
    drawing = out.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # The first tag alone: the page gives the width, viewBox the proportions.
    opening, rest = drawing.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{html.escape(printable(alt))}">{rest}'


def curves(
    name: str,
    alt: str,
    series: Mapping[str, Points],
    *,
    ylabel: str,
    logarithmic: bool = False,
    best: int | None = None,
    level: tuple[str, float] | None = None,
    colour: str | None = None,
) -> str:
    """Figures over steps; `best` marks the step whose weights were kept, `level` is a line to compare with."""

    def paint(axes: Axes) -> None:
        for index, (label, points) in enumerate(series.items()):
            steps, values = list(points), list(points.values())
            marker = "o" if len(steps) < 12 else None
            shown = colour or SERIES[index % len(SERIES)]
            width = 2.0 if label == "loss" else 1.3
            axes.plot(steps, values, marker=marker, markersize=3, label=cut(label, 24), color=shown, linewidth=width)
            if best is not None and best in points:
                axes.plot([best], [points[best]], "D", color=shown, markersize=6, label=f"kept: step {best}")
        if level is not None:
            axes.axhline(level[1], color=COLOURS["teacher"], linestyle="--", linewidth=1, label=level[0])
        if logarithmic:
            axes.set_yscale("log")
            # The default writes its numbers as mathematics, which is switched off here.
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            decades = np.log10(np.divide(*axes.get_ylim()[::-1]))
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if decades < 2.5 else (1,)))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
        last = max(max(points) for points in series.values())
        axes.set_xlim(0, last * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.grid(visible=True)
        _legend(axes)

    return draw(name, alt, 2.7, paint)


def _plain(value: float, place: int | None = None) -> str:
    return f"{value:g}"


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing: in one line where it fits, else in two columns, else in one."""
    handles, labels = axes.get_legend_handles_labels()

    def width(columns: int) -> float:
        """Points, about: a line and its room, and the letters of the longest label of each column."""
        rows = -(-len(labels) // columns)
        return sum(34 + 4.3 * max(map(len, labels[start : start + rows])) for start in range(0, len(labels), rows))

    columns = next(count for count in (len(labels), 2, 1) if count == 1 or width(count) < WIDTH * 72 - 10)
    axes.figure.legend(handles, labels, fontsize=7.5, loc="outside upper left", ncols=columns, borderpad=0)


def _shades(who: str) -> Colormap:
    return LinearSegmentedColormap.from_list(who, ["#ffffff", COLOURS[who]])


def confusion(name: str, alt: str, counts: np.ndarray, names: Sequence[str], who: str) -> str:
    """Gold classes down, predicted ones across; shade: the share of the gold class. counts: (C, C)."""
    classes = len(names)
    size = max(6.4, 8.5 - 0.22 * max(classes - 6, 0))

    def paint(axes: Axes) -> None:
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap=_shades(who), vmin=0, vmax=1, interpolation="none")
        axes.set_xlabel(f"predicted by the {who}")
        axes.set_ylabel("gold")
        axes.spines[:].set_color(FAINT)
        axes.spines[:].set_visible(True)
        if classes <= MOST_NAMES:
            shown = [cut(label, 14) for label in names]
            axes.set_xticks(range(classes), shown, fontsize=size, **_upright(shown))
            axes.set_yticks(range(classes), shown, fontsize=size)
        axes.tick_params(length=0)
        if classes <= MOST_NUMBERS:
            for row, column in np.ndindex(counts.shape):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.55 else INK
                    text = f"{counts[row, column]:,}"
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)

    return draw(name, alt, 3.6, paint)


def _upright(labels: Sequence[str]) -> dict[str, Any]:
    """How labels stand under an axis: across where they are short and few, upwards where not."""
    if sum(map(len, labels)) <= 34:
        return {}
    return {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}


def reliability_diagram(name: str, alt: str, found: Reliability, who: str, of: str) -> str:
    """Above, how often predictions of each bin were right; below, how many there are."""
    bins = len(found.counts)
    middles = (np.arange(bins) + 0.5) / bins
    with _style(name):
        canvas = Canvas(figsize=(WIDTH, 3.6), layout="constrained")
        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color="#64748b", linestyle="--", linewidth=1, label="as promised")
        filled = found.counts > 0
        above.bar(
            middles[filled],
            found.came_true[filled],
            width=0.9 / bins,
            color=COLOURS[who],
            alpha=0.75,
            label="share right",
        )
        above.plot(found.said[filled], found.came_true[filled], "o", color=INK, markersize=3, label="mean probability")
        above.set_ylim(0, 1.03)
        above.set_xlim(0, 1)
        above.set_ylabel("share that was right")
        _legend(above)
        below.bar(middles, found.counts, width=0.9 / bins, color="#94a3b8")
        below.set_ylabel(of)
        below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        below.set_xlabel(f"probability given by the {who}")
        for axes in (above, below):
            axes.grid(visible=True)
            axes.set_axisbelow(True)
        return _svg(canvas, alt)


def scatter(name: str, alt: str, x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str, who: str) -> str:
    """Points and the diagonal on which both agree."""
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    room = (high - low) * 0.04 or 1.0

    def paint(axes: Axes) -> None:
        axes.plot([low, high], [low, high], color="#64748b", linestyle="--", linewidth=1)
        many = len(x) > MOST_VECTOR_POINTS
        axes.plot(x, y, "o", markersize=2.5, alpha=0.4, color=COLOURS[who], markeredgewidth=0, rasterized=many)
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(low - room, high + room)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(visible=True)

    return draw(name, alt, 3.4, paint)


def pairs_of_bars(name: str, alt: str, labels: Sequence[str], values: Mapping[str, Sequence[float]], axis: str) -> str:
    """For each label a bar of every model, across."""
    places = np.arange(len(labels))
    height = 0.8 / len(values)

    def paint(axes: Axes) -> None:
        for index, (who, of) in enumerate(values.items()):
            axes.barh(
                places + (index - (len(values) - 1) / 2) * height, of, height * 0.92, color=COLOURS[who], label=who
            )
        axes.set_yticks(places, [cut(label, 18) for label in labels])
        axes.invert_yaxis()
        axes.set_xlabel(axis)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        if len(values) > 1:
            _legend(axes)

    return draw(name, alt, 1.0 + 0.3 * len(labels), paint)


def attention(name: str, alt: str, weights: np.ndarray, pieces: Sequence[str], who: str) -> str:
    """A map of attention: each row is a piece, and sums to 1 over the pieces that it looks at. weights: (T, T)."""
    shown = [cut(piece, 11) for piece in pieces]
    size = 7.5 if len(pieces) <= 16 else 6.6

    def paint(axes: Axes) -> None:
        # The root of a weight: most weights are small, and a linear shade would hide them.
        axes.imshow(np.sqrt(weights), cmap=_shades(who), vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(
            range(len(shown)), shown, fontsize=size, rotation=90, rotation_mode="anchor", ha="right", va="center"
        )
        axes.set_yticks(range(len(shown)), shown, fontsize=size)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_color(FAINT)
        axes.spines[:].set_visible(True)

    return draw(name, alt, 3.9, paint)


def layer_map(
    name: str,
    alt: str,
    layers: tuple[int, int],
    attention_pairs: Sequence[tuple[int, int]],
    hidden_pairs: Sequence[tuple[int, int]],
) -> str:
    """Teacher layers on the left, student layers on the right, a line for each pair. layers: (student's, teacher's)."""
    student, teacher = layers
    tallest = max(student, teacher)

    def height(layer: int, count: int) -> float:
        """The last layers of both stand side by side at the top, the first ones at the bottom."""
        return float(np.linspace(tallest, 1, count)[count - layer])

    def paint(axes: Axes) -> None:
        same = list(attention_pairs) == list(hidden_pairs)
        for pairs, style, label in (
            (hidden_pairs, "-", "attention and hidden states" if same else "hidden states"),
            ([] if same else attention_pairs, ":", "attention"),
        ):
            for index, (learner, source) in enumerate(pairs):
                ends = [height(source, teacher), height(learner, student)]
                axes.plot([0.08, 0.92], ends, style, color=INK, linewidth=1.4, label=label if index == 0 else None)
        for who, count, x in (("teacher", teacher, 0.0), ("student", student, 1.0)):
            for layer in range(1, count + 1):
                axes.text(
                    x,
                    height(layer, count),
                    f"{who} {layer}",
                    ha="center",
                    va="center",
                    color="white",
                    bbox={"boxstyle": "round,pad=0.35", "facecolor": COLOURS[who], "edgecolor": "none"},
                )
        axes.set_xlim(-0.25, 1.25)
        axes.set_ylim(0.4, tallest + 0.9)
        axes.axis("off")
        axes.legend(fontsize=7.5, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0.0))

    return draw(name, alt, 0.9 + 0.32 * tallest, paint)
