"""Audits of passes without a cache, which begin when the caller has its results already."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.client.test_audited_rows import kept_sessions
from tests.client.test_liars import LIAR, Peers, use
from tests.liars import lies_from
from tests.processes import until

IDS = torch.arange(3, 27)[None]
BATCH = torch.arange(3, 91).reshape(4, 22)


def logits(model: Any, ids: Tensor, **more: Tensor) -> Tensor:
    return cast(Tensor, model(ids, use_cache=False, **more).logits)


def settles(peers: Peers) -> None:
    """Waits until all sessions have ended: those of auditors, too."""
    until(lambda: not any(len(host.sessions) for host in peers.hosts), "all sessions to end", 20.0)


def unsplit(checkpoint: Path, ids: Tensor, **more: Tensor) -> Tensor:
    from transformers import LlamaForCausalLM

    model = cast(Any, LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)).eval()
    with torch.inference_mode():
        return logits(model, ids, **more)


@pytest.mark.parametrize("ids", [IDS, BATCH], ids=["one row", "a batch over several chains"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_honest_peers_are_audited_and_nobody_is_accused(
    checkpoint: Path, peers: Peers, ids: Tensor, codec: str
) -> None:
    with use(peers, checkpoint, codec=codec) as client:
        sessions = kept_sessions(client.model)
        found = logits(client.model, ids)
        settles(peers)
        assert codec != "none" or torch.allclose(found, unsplit(checkpoint, ids), atol=1e-5)
        for session in sessions:
            stats = session.auditor.stats
            assert stats.audits == 2 and stats.tokens == 2 * ids.shape[1], stats
            assert not stats.unaudited, stats
        assert not client.swarm.blame.avoided() and not client.events, client.events


def test_padding_is_left_out(checkpoint: Path, peers: Peers) -> None:
    mask = torch.ones_like(BATCH)
    mask[1, :20] = 0
    with use(peers, checkpoint) as client:
        found = logits(client.model, BATCH, attention_mask=mask)
        settles(peers)
        wanted = unsplit(checkpoint, BATCH, attention_mask=mask)
        assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)
        assert not client.swarm.blame.avoided() and not client.events, client.events


@pytest.mark.parametrize("own", ["", "3:6"], ids=["others", "this client"])
def test_a_liar_is_told_of_and_not_used_again(checkpoint: Path, peers: Peers, own: str) -> None:
    peers.liars[LIAR].lie = lies_from(0)
    with use(peers, checkpoint, **({"audit_blocks": own} if own else {})) as client, torch.inference_mode():
        wanted = unsplit(checkpoint, IDS)
        assert not torch.allclose(logits(client.model, IDS), wanted, atol=1e-2), "nobody waits for the audit"
        until(lambda: client.swarm.blame.avoided() == {peers.ids[LIAR]}, "the liar to be found", 20.0)
        who = "this client" if own else "two others"
        assert any(f"did not compute what {who} did" in event for event in client.events), client.events
        settles(peers)
        assert torch.allclose(logits(client.model, IDS), wanted, atol=1e-5)
        assert peers.ids[LIAR] not in client.chain
        settles(peers)


def test_a_lie_in_one_portion_of_a_batch_is_found(checkpoint: Path, peers: Peers) -> None:
    """Its rows go over two chains; the auditors of one are peers of the other."""
    peers.liars[LIAR].lie = lies_from(0)
    with use(peers, checkpoint) as client, torch.inference_mode():
        for _ in range(5):
            logits(client.model, BATCH)
            settles(peers)
        assert client.swarm.blame.avoided() == {peers.ids[LIAR]}
        assert torch.allclose(logits(client.model, BATCH), unsplit(checkpoint, BATCH), atol=1e-5)
        settles(peers)


def test_only_what_is_drawn_is_audited(checkpoint: Path, peers: Peers) -> None:
    with use(peers, checkpoint, audit=0.0) as client:
        opened = sum(host.sessions.opened for host in peers.hosts)
        logits(client.model, IDS)
        assert sum(host.sessions.opened for host in peers.hosts) == opened + 2
        assert not any(len(host.sessions) for host in peers.hosts), "what is not audited is closed at once"


def test_an_audit_that_takes_too_long_ends(checkpoint: Path, peers: Peers) -> None:
    with use(peers, checkpoint, audit_wait_s=0.0) as client:
        sessions = kept_sessions(client.model)
        logits(client.model, IDS)
        settles(peers)
        (session,) = sessions
        stats = session.auditor.stats
        assert stats.audits + sum(stats.unaudited.values()) == 2, stats
        assert not client.swarm.blame.avoided() and not client.events, client.events
