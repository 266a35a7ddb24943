"""What breaks a chain: hops that failed, and why."""

from __future__ import annotations

from dataclasses import dataclass

from client.hop import Hop
from protocol.errors import PotluckError


@dataclass(frozen=True, slots=True)
class Loss:
    """A hop that failed. `resumable`: perhaps only the connection did."""

    hop: Hop
    error: PotluckError
    resumable: bool = False


class ChainBroken(Exception):
    """Hops of the chain failed."""

    def __init__(self, *losses: Loss) -> None:
        super().__init__(str(losses[0].error))
        self.losses = losses
