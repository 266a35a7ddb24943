"""Curves as SVG files, by matplotlib; the same figures give the same file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import Plot

SIZE_INCHES = (4.6, 3.2)  # of one panel
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "potluck",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
}


def draw(plots: Sequence[Plot], path: Path) -> None:
    """The plots side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        width, height = SIZE_INCHES
        figure = Figure(figsize=(width * len(plots), height), layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
            _panel(axes, plot)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(axes: Any, plot: Plot) -> None:
    for curve in plot.curves:
        middle = [y.median for y in curve.ys]
        low = [y.median - y.low for y in curve.ys]
        high = [y.high - y.median for y in curve.ys]
        axes.errorbar(curve.xs, middle, yerr=[low, high], label=curve.name, marker="o", markersize=3, capsize=2)
    if plot.log_x:
        axes.set_xscale("log", base=2)
    xs = sorted({x for curve in plot.curves for x in curve.xs})
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(plot.title)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
