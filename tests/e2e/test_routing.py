"""Peers and clients measure their round trips, over real processes and a real DHT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from client.config import ClientConfig
from client.swarm import Swarm
from dht.record import PeerRecord
from tests.processes import at_home, swarm, until


def test_round_trips_are_measured_and_published(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text("[dht]\nannounce_every_s = 1.0\n")
    with at_home(home), swarm(home, checkpoint("llama"), ["3:6", "0:3"]) as peers:
        last, first = peers.peers
        with Swarm.connect(ClientConfig(join=peers.join)) as client:
            (model,) = client.view.models
            until(lambda: len(client.refresh().online(model.fingerprint)) == 2, "both peers in the client's view")
            known = client.peers_of(model.fingerprint)
            assert set(known.times().rtts_ms) == {first.peer_id, last.peer_id}, "measured before the first route"

            def published() -> PeerRecord | None:
                peer = client.refresh().peer(first.peer_id)
                return peer if peer is not None and peer.rtts_ms else None

            record = until(published, "round-trip times in the record of the first peer")
            assert record is not None
            ((peer_id, rtt_ms),) = record.rtts_ms
            assert peer_id == last.peer_id
            assert 0 < rtt_ms < 1000
