"""Plots of the report as SVG that follows the page: its text, in light and in dark, and its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

INK = "#010101"  # becomes the colour of the page's text
COLOURS = [f"#01010{number}" for number in range(2, 10)]  # become --c0 to --c7 of the stylesheet
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Point:
    """A value with its 95 % interval, in percent: one mark of a plot. row, series: where it stands and what it belongs to."""

    row: str
    series: str
    value: float
    low: float | None
    high: float | None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Any, title: str) -> Markup:
    """Return a figure as SVG whose colours are those of the page. Equal figures give equal text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{number})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def _dress(axes: Any, title: str, label: str) -> None:
    """Give a panel the colours of the page and little ink."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=9, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.patch.set_visible(False)


def intervals(
    title: str, panels: Mapping[str, Sequence[Point]], order: Sequence[str], label: str, zero: bool = False
) -> Markup | None:
    """Return a plot with a panel for each metric: values with intervals, a line of text for each row, a colour for each series.

    order: all series, so that each has the same colour in every plot. zero: mark zero, for differences. Returns None without
    any point.
    """
    panels = {name: points for name, points in panels.items() if points}
    if not panels:
        return None
    every = [point for points in panels.values() for point in points]
    rows, found = (list(dict.fromkeys(values)) for values in ([p.row for p in every], [p.series for p in every]))
    shared = any(point.row != point.series for point in every)  # otherwise each row is a series, and needs no legend
    series = sorted(found, key=order.index)
    looks = {name: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(order)}
    figure = _figure(2.6 * len(panels) + 1.2, 0.9 + len(rows) * max(0.3, 0.17 * len(series) * shared) + 0.22 * shared)
    places = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, points) in zip(places, panels.items(), strict=True):
        for point in points:
            offset = (series.index(point.series) - (len(series) - 1) / 2) * 0.7 / len(series) if shared else 0
            place, (colour, marker) = rows.index(point.row) + offset, looks[point.series]
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot([point.value], [place], marker, color=colour, markersize=4.5)
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        for place in range(1, len(rows)):
            axes.axhline(place - 0.5, color=INK, linewidth=0.4, alpha=0.25)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows)
        _dress(axes, name, label)
    if shared:
        handles = []
        for name in series:
            colour, marker = looks[name]
            handles += figure.axes[0].plot([], [], marker=marker, color=colour, markersize=4.5, label=name)
        figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False, labelcolor=INK)
    return _svg(figure, title)


def losses(title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Markup | None:
    """Return a plot of training losses by step. curves: steps and values of each checkpoint."""
    if not curves:
        return None
    figure = _figure(7, 3)
    axes = figure.subplots()
    for number, (name, (steps, values)) in enumerate(curves.items()):
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(steps, values, style, color=COLOURS[number % len(COLOURS)], linewidth=1.4, label=name)
    _dress(axes, "", "optimizer step")
    figure.legend(loc="outside right upper", fontsize=9, frameon=False, labelcolor=INK)
    return _svg(figure, title)
