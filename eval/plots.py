"""Plots of scores against what they cost: one line a method, SVG and PNG with the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visiontok.errors import ConfigError
from visiontok.statistics import Estimate

INK, FAINT = "#1a1a19", "#deddd8"
"""Of text and of the grid; a page that inlines a plot replaces them by its own."""
RESIZE = "resize"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
_MARKERS = "osD^vP<>"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Point:
    """What a method scores at one budget, and what that costs.

    Attributes:
        label: method and budget.
        x: the cost.
        score: with its interval.
    """

    label: str
    x: float
    score: Estimate


@dataclass(frozen=True)
class Plot:
    """Scores against a cost.

    Attributes:
        name: of its files.
        title: above it.
        x: name of the cost, with its unit.
        y: name of the score.
        curves: method → its points.
        levels: runs without a budget, drawn as lines across.
        ticks: only at the costs that there are, on a logarithmic axis.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[Point]]
    levels: Mapping[str, Estimate]
    ticks: bool = False

    def front(self) -> set[str]:
        """Labels of the points that nothing cheaper or as cheap outdoes."""
        points = [point for curve in self.curves.values() for point in curve]
        return {
            one.label
            for one in points
            if not any(
                (other.x, -other.score.value) != (one.x, -one.score.value)
                and other.x <= one.x
                and other.score.value >= one.score.value
                for other in points
            )
        }


def require() -> None:
    """Whether plots can be drawn.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ConfigError("a report draws plots, which needs matplotlib: pip install 'visiontok[report]'") from error


def draw(plot: Plot) -> tuple[str, bytes]:
    """As SVG and as PNG."""
    require()
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": plot.name}):
        figure = Figure(figsize=(7.2, 3.9), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        _fill(figure.add_subplot(facecolor="none"), plot)
        vector, pixels = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        figure.savefig(pixels, format="png", dpi=150, metadata={"Software": None})
    return vector.getvalue(), pixels.getvalue()


def _fill(axes: Any, plot: Plot) -> None:
    front = plot.front()
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, level in plot.levels.items():
        dashes = "-" if name == "full" else (0, (1, 2))
        axes.axhline(level.value, color=INK, linewidth=1.2, linestyle=dashes, label=name)
        axes.axhspan(level.low, level.high, color=INK, alpha=0.06, linewidth=0)
    others = [method for method in plot.curves if method != RESIZE and method not in plot.levels]
    for method, curve in plot.curves.items():
        points = sorted(curve, key=lambda point: point.x)
        place = others.index(method) if method in others else 0
        colour = INK if method == RESIZE or method in plot.levels else _COLOURS[place % len(_COLOURS)]
        marker = "s" if method == RESIZE else _MARKERS[place % len(_MARKERS)]
        xs, ys = [point.x for point in points], [point.score.value for point in points]
        spans = [[p.score.value - p.score.low for p in points], [p.score.high - p.score.value for p in points]]
        axes.errorbar(xs, ys, spans, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, alpha=0.7)
        style = "--" if method == RESIZE else "-"
        axes.plot(
            xs,
            ys,
            style,
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.6,
            label=None if method in plot.levels else method,
        )
        for point in points:
            if point.label not in front:
                axes.plot([point.x], [point.score.value], marker, color=colour, markersize=6, markerfacecolor="white")
    if plot.ticks:
        from matplotlib.ticker import NullLocator

        axes.set_xscale("log", base=2)
        costs: list[float] = []
        for x in sorted({point.x for curve in plot.curves.values() for point in curve}):
            if not costs or x > 1.15 * costs[-1]:  # or labels overlap
                costs.append(x)
        axes.set_xticks(costs, [f"{cost:.4g}" for cost in costs])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    axes.set_title(plot.title)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def inline(svg: str, name: str) -> str:
    """A plot as a part of a page: in the page's colours and font, with ids of its own, and nothing like a request."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{name}"', svg, count=1)
    for colour, variable in ((INK, "var(--ink)"), (FAINT, "var(--line)"), ("#ffffff", "var(--page)")):
        svg = svg.replace(colour, variable)
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
