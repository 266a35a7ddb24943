"""What a session needs of the swarm: its model's peers, channels to them, and what is known of their times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import grpc

from client.times import Stopwatch, Times
from dht.record import PeerRecord
from protocol.limits import WIRE_VERSION
from protocol.messages import Open

if TYPE_CHECKING:
    from client.swarm import Swarm


class Peers(Protocol):
    """What a session needs of the swarm."""

    def peers(self) -> Sequence[PeerRecord]:
        """The model's peers, as last seen."""

    async def refresh(self) -> None:
        """Looks again, now."""

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        """A channel to the peer, pinned to its certificate."""

    async def approach(self, peers: Sequence[PeerRecord]) -> None:
        """Seeks ways to them that go through no relay, for a moment, before a session begins."""

    def cuts(self) -> tuple[int, ...] | None:
        """The blocks before which the model may be cut; None: anywhere."""

    def times(self) -> Times:
        """What this client has measured of the peers."""

    def signed(self, request: Open, peer: PeerRecord) -> Open:
        """The request, as this peer takes it from this client."""

    @property
    def stopwatch(self) -> Stopwatch:
        """To be told of their replies."""


class ModelPeers:
    """One model's peers in a joined swarm: see `Peers`.

    Args:
        planned: ids of peers that a plan chose: the only ones to be seen, as long as all are there and none has failed.
    """

    def __init__(self, swarm: Swarm, fingerprint: str, planned: Collection[str] = ()) -> None:
        self._swarm = swarm
        self._fingerprint = fingerprint
        self._planned = frozenset(planned)

    def peers(self) -> Sequence[PeerRecord]:
        """Those that can be reached and speak this version of the protocol."""
        online = self._swarm.view.online(self._fingerprint)
        able = [peer for peer in online if peer.addresses and peer.wire_version == WIRE_VERSION]
        if not self._planned or self._planned & self._swarm.blame.avoided():
            return able
        planned = [peer for peer in able if peer.peer_id in self._planned]
        return planned if len(planned) == len(self._planned) else able

    def cuts(self) -> tuple[int, ...] | None:
        """The blocks before which the model may be cut; None: its peers do not say, or anywhere."""
        model = self._swarm.view.model(self._fingerprint)
        return (model.cuts or None) if model is not None else None

    def planned(self, peer_ids: Collection[str]) -> ModelPeers:
        """The same, seen as a plan chose."""
        return ModelPeers(self._swarm, self._fingerprint, peer_ids)

    @property
    def stopwatch(self) -> Stopwatch:
        """To be told of peers' replies."""
        return self._swarm.stopwatch

    def times(self) -> Times:
        """What this client has measured itself."""
        return self._swarm.stopwatch.snapshot()

    def signed(self, request: Open, peer: PeerRecord) -> Open:
        """The request, as this peer takes it from this client."""
        return self._swarm.signed(request, peer)

    async def refresh(self) -> None:
        await self._swarm.look_again()

    async def approach(self, peers: Sequence[PeerRecord]) -> None:
        await self._swarm.channels.approach(peers)

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        return self._swarm.channels.to(peer, doubted=peer.peer_id in self._swarm.blame.avoided())
