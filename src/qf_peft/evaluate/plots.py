"""Two kinds of plot as inline SVG, drawn by matplotlib: lines with intervals, and bars.

They take the text's colour from the page.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .metrics import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#2f7ed8", "#e8590c", "#2b9348", "#a64ac9")  # to be told apart on white and on black
_INK = "#010203"  # stands for the page's text colour, for which matplotlib has no name
_LABELS = 12  # more have no room below the axis
_APART = 0.06  # between curves at one place, so that equal ones do not hide each other


def lines(title: str, labels: Sequence[str], series: Mapping[str, Sequence[Metric | float]], axis: str) -> str:
    """Curves of shares (0 to 1) at evenly spaced places with these labels; a bar at each point is its interval."""
    figure = _figure(title, labels, axis)
    axes = figure.axes[0]
    for number, (name, values) in enumerate(series.items()):
        shift = _APART * (number - (len(series) - 1) / 2)
        middle = [v.value if isinstance(v, Metric) else v for v in values]
        ends = [(v.low, v.high) if isinstance(v, Metric) else (v, v) for v in values]
        below = [m - max(low, 0.0) for m, (low, _) in zip(middle, ends, strict=True)]
        above = [min(high, 1.0) - m for m, (_, high) in zip(middle, ends, strict=True)]
        axes.errorbar(
            [k + shift for k in range(len(labels))], middle, yerr=[below, above], label=name, marker="o", markersize=4,
            color=_COLOURS[number % len(_COLOURS)], elinewidth=1, clip_on=False,
        )  # fmt: skip
    axes.set_ylim(0, 1)
    if len(series) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=_INK)
    return _svg(figure, title)


def bars(title: str, labels: Sequence[str], values: Sequence[float], axis: str) -> str:
    """A bar for each value, from zero up or down."""
    figure = _figure(title, labels, axis)
    figure.axes[0].bar(range(len(labels)), values, width=0.7, color=_COLOURS[0], clip_on=False)
    return _svg(figure, title)


def _figure(title: str, labels: Sequence[str], axis: str) -> Figure:
    """An empty figure with a title, a scale, and as many of the labels as there is room for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    step = -(-len(labels) // _LABELS)
    shown = range((len(labels) - 1) % step, len(labels), step)  # the last one always
    axes.set_xticks(shown, [labels[k] for k in shown], color=_INK)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.set_xlabel(axis, color=_INK)
    axes.grid(axis="y", color=_INK, alpha=0.2, clip_on=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    return figure


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element that can stand in a page: letters stay letters, and the ids of two differ."""
    import matplotlib

    file, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": f"qf_peft: {title}", "font.family": "sans-serif"}
    ):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    labelled = f'<svg role="img" aria-label="{html.escape(title)}"'
    drawn = file.getvalue().replace(_INK, "currentColor").replace("<svg", labelled, 1)
    return drawn[drawn.index("<svg") :].strip()
