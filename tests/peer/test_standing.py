"""What a peer's record says of what it has served: over moves, and not of work that is measured, not served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from peer.config import PeerConfig
from peer.host import Served
from peer.meter import Meter
from peer.standing import Standing
from protocol.span import Span
from tests.dht.support import identity


def host(span: Span) -> Any:
    """As much of a host as a record tells of."""
    return SimpleNamespace(
        model=SimpleNamespace(span=span, dtype=torch.float32, quantization="none", device=torch.device("cpu")),
        port=4200,
        batches=True,
        meter=Meter(len(span)),
        sessions=SimpleNamespace(tokens_left=10),
        budget=SimpleNamespace(tokens_total=20),
    )


def test_what_was_served_is_counted_over_moves() -> None:
    served = Served("tiny", "f" * 32, 24, tuple(range(25)))
    config = PeerConfig(contact="zoe@example.org")
    standing = Standing(identity(0), served, Span(0, 4), config, lambda: ["127.0.0.1"])
    assert standing.record().tokens_served == 0
    assert standing.record().contact == "zoe@example.org"
    first, second = host(Span(0, 4)), host(Span(4, 8))
    standing.serve(first, {})
    first.meter.measured(5.0, 1.0)
    assert standing.record().tokens_served == 0
    first.meter.note(4, 7, 1, 0.0, 5.0, 1.0)
    assert standing.record().tokens_served == 7
    standing.claim(Span(4, 8))
    assert standing.record().tokens_served == 7
    standing.serve(second, {})
    second.meter.note(4, 1, 2, 0.0, 5.0, 2.0)
    assert standing.record().tokens_served == 9
