"""Peers and clients measure their round trips, over real processes and a real DHT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from client.config import ClientConfig
from client.model import SwarmModelForCausalLM
from client.swarm import Swarm
from dht.record import PeerRecord
from protocol.errors import BlocksMissing
from tests.processes import at_home, run, swarm, until, wait_online


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


def test_peers_are_pinned_avoided_and_trusted(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder, ids = str(checkpoint("llama")), torch.tensor([[5, 6, 7]])
    with at_home(tmp_path), swarm(tmp_path, Path(folder), ["0:6", "0:6"]) as peers:
        one, other = peers.peers
        with Swarm.connect(ClientConfig(join=peers.join)) as client:
            wait_online(client, 2)
            for rules in (
                {"route": [one.peer_id]},
                {"avoid": [other.peer_id[-8:]]},
                {"trust": [one.peer_id], "trusted_only": True},
            ):
                for _ in range(3):
                    model = SwarmModelForCausalLM.from_pretrained(folder, swarm=client, **rules)
                    model.generate(ids, max_new_tokens=2)
                    assert [link.peer.peer_id for link in model.chain] == [one.peer_id], rules
            one.kill()
            pinned = SwarmModelForCausalLM.from_pretrained(folder, swarm=client, route=[one.peer_id])
            pinned.generate(ids, max_new_tokens=2)
            assert [link.peer.peer_id for link in pinned.chain] == [other.peer_id], "others for what is left"
            avoiding = SwarmModelForCausalLM.from_pretrained(
                folder, swarm=client, avoid=[one.peer_id, other.peer_id], wait_s=0.0
            )
            with pytest.raises(BlocksMissing, match="served only by peers that --avoid leaves out"):
                avoiding.generate(ids, max_new_tokens=2)


def test_the_flags_of_the_command_line(tmp_path: Path) -> None:
    with swarm(tmp_path, None, ["0:24", "0:24"]) as peers:
        one, other = peers.peers
        for flags in (["--route", one.peer_id[-8:]], ["--trusted-only", "--trust", one.peer_id]):
            ended = run(tmp_path, "client", "generate", "What is the capital of France?", "--stats", *flags)
            assert (ended.code, ended.stdout) == (0, "Paris\n"), ended.stderr
            assert one.peer_id[-8:] in ended.stderr, flags
        chatted = run(tmp_path, "client", "chat", "--avoid", other.peer_id[-6:], stdin="What is 30 + 12?\n/exit\n")
        assert chatted.stdout.split() == ["42"], chatted.stderr
