"""Two kinds of plot as inline SVG: lines with intervals, and bars. They take the text's colour from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from .metrics import Metric

_COLOURS = ("#2f7ed8", "#e8590c", "#2b9348", "#a64ac9")  # to be told apart on white and on black
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 52, 46


def lines(title: str, labels: Sequence[str], series: Mapping[str, Sequence[Metric | float]], axis: str) -> str:
    """Curves of shares (0 to 1) at evenly spaced places with these labels; a bar at each point is its interval."""
    figure, y = _frame(title, 0.0, 1.0)
    places = _places(labels, figure, axis)
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shift = 3.0 * (number - (len(series) - 1) / 2)  # so that equal curves do not hide each other
        points = [(x + shift, v) for x, v in zip(places, values, strict=True)]
        path = " ".join(f"{x:.1f},{y(_value(v)):.1f}" for x, v in points)
        _add(figure, "polyline", points=path, fill="none", stroke=colour, stroke_width=2)
        for x, v in points:
            dot = _add(figure, "circle", cx=x, cy=y(_value(v)), r=3.5, fill=colour)
            SubElement(dot, "title").text = f"{name}: {v if isinstance(v, Metric) else format(v, '.3f')}"
            if isinstance(v, Metric):
                low, high = max(v.low, 0.0), min(v.high, 1.0)
                _add(figure, "line", x1=x, x2=x, y1=y(low), y2=y(high), stroke=colour, stroke_opacity=0.6)
        at = _LEFT + 130 * number
        _add(figure, "rect", x=at, y=30, width=10, height=10, fill=colour)
        _text(figure, at + 15, 39, name)
    return _finished(figure)


def bars(title: str, labels: Sequence[str], values: Sequence[float], axis: str) -> str:
    """A bar for each value, from zero up or down."""
    figure, y = _frame(title, min(0.0, *values), max(0.0, *values) or 1.0)
    places = _places(labels, figure, axis)
    width = 0.7 * (_WIDTH - _LEFT - _RIGHT) / len(labels)
    for x, label, value in zip(places, labels, values, strict=True):
        top, foot = sorted((y(value), y(0.0)))
        bar = _add(figure, "rect", x=x - width / 2, y=top, width=width, height=foot - top, fill=_COLOURS[0])
        SubElement(bar, "title").text = f"{label}: {value:.3f}"
    return _finished(figure)


def _value(v: Metric | float) -> float:
    return v.value if isinstance(v, Metric) else v


def _frame(title: str, low: float, high: float):
    """A figure with a title and a scale, and the function from values to heights in it."""
    figure = Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", fill="currentColor"
    )
    figure.set("font-family", "sans-serif")
    figure.set("font-size", "12")
    figure.set("aria-label", title)
    SubElement(figure, "title").text = title
    _text(figure, _LEFT, 18, title).set("font-weight", "bold")

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    step = 10 ** math.floor(math.log10(high - low))
    step *= next(f for f in (0.1, 0.2, 0.25, 0.5, 1.0) if (high - low) / (step * f) <= 6)
    tick = math.ceil(low / step - 1e-9)
    while tick * step <= high + 1e-9:
        at = y(tick * step)
        _add(figure, "line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, stroke="currentColor", stroke_opacity=0.2)
        _text(figure, _LEFT - 6, at + 4, f"{tick * step:g}", "end")
        tick += 1
    return figure, y


def _places(labels: Sequence[str], figure: Element, axis: str) -> list[float]:
    """Evenly spaced places, with as many labels as there is room for."""
    room = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    places = [_LEFT + room * (k + 0.5) for k in range(len(labels))]
    free = 0.0
    for x, label in zip(places, labels, strict=True):
        half = 3.5 * len(label)
        if x - half >= free:
            _text(figure, x, _HEIGHT - _BOTTOM + 16, label, "middle")
            free = x + half + 4
    _text(figure, (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, axis, "middle")
    return places


def _add(figure: Element, tag: str, **attributes: float | str) -> Element:
    shown = {k.replace("_", "-"): f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
    return SubElement(figure, tag, shown)


def _text(figure: Element, x: float, y: float, text: str, anchor: str = "start") -> Element:
    element = _add(figure, "text", x=float(x), y=float(y), text_anchor=anchor)
    element.text = text
    return element


def _finished(figure: Element) -> str:
    return tostring(figure, encoding="unicode")
