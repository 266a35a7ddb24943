"""Curves over time as an SVG, written by hand: no plotting library for two panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 860
PANEL_HEIGHT: Final = 200
MARGIN: Final = 60
GAP: Final = 50
COLOURS: Final = ("#1b6ca8", "#c8553d", "#588157", "#7b5ea7")


@dataclass(frozen=True, slots=True)
class Line:
    """A named curve: hours and values, equally many."""

    name: str
    hours: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over one time axis, from `bottom` to `top`; what lies outside is drawn at the edge."""

    title: str
    lines: Sequence[Line]
    bottom: float
    top: float
    unit: str = ""

    def share(self, value: float) -> float:
        """Where a value lies between bottom, 0, and top, 1."""
        return min(max((value - self.bottom) / (self.top - self.bottom), 0.0), 1.0)


def svg(panels: Sequence[Panel], hours: float) -> str:
    """The panels one below the other, as one SVG document."""
    height = len(panels) * (PANEL_HEIGHT + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, GAP + index * (PANEL_HEIGHT + GAP), hours)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top_px: float, hours: float) -> list[str]:
    bottom_px, width_px = top_px + PANEL_HEIGHT, WIDTH - 2 * MARGIN
    parts = [f'<text x="{MARGIN}" y="{top_px - 10}" font-weight="bold">{panel.title}</text>']
    for step in range(5):
        y = bottom_px - step / 4 * PANEL_HEIGHT
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        label = f"{panel.bottom + (panel.top - panel.bottom) * step / 4:.4g}{panel.unit}"
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for step in range(7):
        x = MARGIN + step / 6 * width_px
        parts.append(f'<text x="{x:.1f}" y="{bottom_px + 16:.1f}" text-anchor="middle">{hours * step / 6:.3g} h</text>')
    for index, line in enumerate(panel.lines):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(
            f"{MARGIN + hour / hours * width_px:.1f},{bottom_px - panel.share(value) * PANEL_HEIGHT:.1f}"
            for hour, value in zip(line.hours, line.values, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"/>')
        x = WIDTH - MARGIN - 110 * (len(panel.lines) - index)
        parts.append(f'<text x="{x}" y="{top_px - 10}" fill="{colour}">{line.name}</text>')
    return parts
