"""The house: what all streams to one peer share."""

from __future__ import annotations

from dataclasses import dataclass

from peer.compute import ComputeThread
from peer.engine import Engine
from peer.gate import Gate
from peer.intake import Intake
from peer.links import Links
from peer.receipts import Receipts
from peer.table import SessionTable
from peer.tally import Tally


@dataclass(slots=True)
class House:
    """What all streams to one peer share.

    Attributes:
        gate: says who may open sessions.
        intake: takes their steps in.
        engine, compute: compute them.
        tally: counts what comes, goes and is refused.
        receipts: signs what was computed.
        links: to the peers after this one; there before the port opens.
    """

    gate: Gate
    sessions: SessionTable
    intake: Intake
    engine: Engine
    compute: ComputeThread
    tally: Tally
    receipts: Receipts
    links: Links | None = None
