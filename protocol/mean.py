"""How many measurements become one number."""

from __future__ import annotations

SMOOTHING = 0.3  # weight of a new measurement


def smoothed(before: float | None, measured: float) -> float:
    """The running mean after one more measurement; None: there was none before."""
    return measured if before is None else before + SMOOTHING * (measured - before)
