"""Are activations such as a model makes? A cheap look at what comes from others, in every step."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from protocol.errors import Implausible

LARGEST: Final = 1e8
"""Magnitude of a hidden state. The largest that models are known to make are below 1e6, in a few channels of the first
token (arXiv:2402.17762)."""


def check_plausible(hidden: Tensor) -> None:
    """One pass over the values; on a GPU it waits for it.

    Raises:
        Implausible: one is not a number, infinite, or absurdly large.
    """
    peak = float(hidden.detach().abs().amax()) if hidden.numel() else 0.0
    if not peak <= LARGEST:  # false for NaN, too
        raise Implausible(f"activations up to {peak:g}: no model makes such")
