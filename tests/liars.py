"""Peers that lie: real ones, with somebody between their blocks and what they send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from peer.host import SpanHost

Lie = Callable[[int, Tensor], Tensor]
"""What is sent in place of a step's output: the step's number, the output."""


def honest(step_id: int, hidden: Tensor) -> Tensor:
    return hidden


def lies_from(first: int) -> Lie:
    return lambda step_id, hidden: -hidden if step_id >= first else hidden


@dataclass(eq=False)
class Liar:
    """Stands between a peer's blocks and what it sends. Honest until it is given a lie."""

    host: SpanHost
    lie: Lie = honest

    def __post_init__(self) -> None:
        worker = cast(Any, self.host.engine)._worker
        onward = worker._onward
        worker._onward = lambda session, step, hidden: onward(session, step, self.lie(step.step_id, hidden))
