"""What a session needs of the swarm: its model's peers, channels to them, and what is known of their times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc

from client.times import Stopwatch, Times
from dht.record import PeerRecord
from protocol.messages import Open


class Peers(Protocol):
    """What a session needs of the swarm."""

    def peers(self) -> Sequence[PeerRecord]:
        """The model's peers, as last seen."""

    async def refresh(self) -> None:
        """Looks again, now."""

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        """A channel to the peer, pinned to its certificate."""

    def cuts(self) -> tuple[int, ...] | None:
        """The blocks before which the model may be cut; None: anywhere."""

    def times(self) -> Times:
        """What this client has measured of the peers."""

    def signed(self, request: Open, peer: PeerRecord) -> Open:
        """The request, as this peer takes it from this client."""

    @property
    def stopwatch(self) -> Stopwatch:
        """To be told of their replies."""
