"""Peers that lie, in the middle of an answer: the answer is right all the same, and they are found."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from client.config import ClientConfig
from client.model import SwarmModel, SwarmModelForCausalLM
from client.session import Session
from client.swarm import Swarm
from peer.host import SpanHost
from protocol.credentials import ClientKey, Credentials
from protocol.errors import Doubted, UserError
from protocol.messages import Step
from slicing import RemoteCache
from tests.api.local import Reader
from tests.harness import identity
from tests.liars import Liar, Lie, lies_from

IDS = torch.tensor([[5, 17, 3, 42, 8]])
NEW_TOKENS = 24
SPANS = ("0:3", "3:6", "3:6", "3:6", "0:3")
LIAR = 1  # of these hosts; the first two make the chain


@dataclass
class Peers:
    loop: asyncio.AbstractEventLoop
    hosts: Sequence[SpanHost]
    liars: Sequence[Liar]

    @property
    def ids(self) -> list[str]:
        return [host.identity.peer_id for host in self.hosts]


@dataclass
class Use:
    """A client of these peers."""

    model: SwarmModel
    swarm: Swarm
    events: list[str] = field(default_factory=list)

    def answer(self, **settings: Any) -> Tensor:
        kwargs = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
        return cast(Tensor, self.model.generate(IDS, **(kwargs | settings)))

    @property
    def chain(self) -> list[str]:
        return [link.peer.peer_id for link in self.model.chain]


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> Tensor:
    """What the unsplit model answers."""
    from transformers import LlamaForCausalLM

    model = cast(Any, LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)).eval()
    return cast(
        Tensor, model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW_TOKENS, pad_token_id=0)
    )


@contextmanager
def use(peers: Peers, checkpoint: Path, hosts: Sequence[int] = range(len(SPANS)), **settings: Any) -> Iterator[Use]:
    """A client that knows some of the peers, and takes the first two of them where it can."""
    route = tuple(identity(index).peer_id for index in (0, LIAR))
    given: dict[str, Any] = {"codec": "none", "wait_s": 20.0, "avoid_s": 5.0, "route": route, "audit": 1.0}
    config = ClientConfig(**(given | settings))
    swarm, events = Swarm(config), list[str]()
    swarm._credentials = Credentials(ClientKey.ephemeral())
    swarm._loop, swarm._reader = peers.loop, cast(Any, Reader([peers.hosts[index] for index in hosts]))
    model = SwarmModelForCausalLM.from_pretrained(str(checkpoint), swarm=swarm, config=config, on_event=events.append)
    try:
        yield Use(model, swarm, events)
    finally:
        asyncio.run_coroutine_threadsafe(swarm._disconnect(), peers.loop).result()


class Screen(BaseStreamer):
    """What a person would see."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.doubts: list[tuple[int, int]] = []  # the first token in doubt, and how many were seen by then
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def on_doubt(self, first: int) -> None:
        self.doubts.append((first, len(self.tokens) - IDS.shape[1]))

    def end(self) -> None:
        self.ends += 1


def test_honest_peers_are_audited_and_nobody_is_accused(checkpoint: Path, peers: Peers, wanted: Tensor) -> None:
    with use(peers, checkpoint) as client, client.model.session() as session:
        assert torch.equal(client.answer(), wanted)
        stats = cast(Session, client.model.blocks.session_of(session.cache)).auditor.stats
        assert client.chain == peers.ids[:2]
    assert stats.audits >= 2 and stats.tokens >= 40, stats
    assert not stats.liars and not client.swarm.blame.avoided() and not client.events, client.events


@pytest.mark.parametrize("first", [6, *(pytest.param(first, marks=pytest.mark.slow) for first in (0, 12))])
def test_a_liar_is_found_and_the_answer_is_right(checkpoint: Path, peers: Peers, wanted: Tensor, first: int) -> None:
    peers.liars[LIAR].lie = lies_from(first)
    screen = Screen()
    with use(peers, checkpoint, speculate="off") as client:
        assert torch.equal(client.answer(streamer=screen), wanted)
        assert peers.ids[LIAR] not in client.chain
        assert client.swarm.blame.avoided() == {peers.ids[LIAR]}
        assert any("did not compute what two others did" in event for event in client.events), client.events
        assert f"the answer is wrong from its token {first} on, and is made again" in client.events
        ((doubtful, seen),) = screen.doubts
        assert doubtful == first
        after = screen.tokens[IDS.shape[1] + seen :]
        assert screen.ends == 1
        assert after == wanted[0, IDS.shape[1] + first :].tolist() or not after, "what is seen after the doubt is right"
        client.events.clear()
        assert torch.equal(client.answer(), wanted), "the liar is not used again"
        assert not client.events


@pytest.mark.slow
def test_an_answer_of_a_conversation_is_corrected_too(checkpoint: Path, peers: Peers, wanted: Tensor) -> None:
    peers.liars[LIAR].lie = lies_from(9)
    with use(peers, checkpoint) as client, client.model.session():
        assert torch.equal(client.answer(), wanted)
        longer = torch.cat([wanted, IDS], dim=1)
        client.model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=2, pad_token_id=0)
        assert peers.ids[LIAR] not in client.chain


def test_a_sampled_answer_is_made_again_from_the_same_random_numbers(checkpoint: Path, peers: Peers) -> None:
    sampling = {"do_sample": True, "temperature": 1.0}
    with use(peers, checkpoint, audit=0.0) as client:
        torch.manual_seed(3)
        wanted = client.answer(**sampling)
    peers.liars[LIAR].lie = lies_from(7)
    with use(peers, checkpoint) as client:
        torch.manual_seed(3)
        assert torch.equal(client.answer(**sampling), wanted)
        assert any("made again" in event for event in client.events)


@pytest.mark.slow
def test_who_is_accused_wrongly_by_a_lying_auditor_stays(checkpoint: Path, peers: Peers, wanted: Tensor) -> None:
    auditors: list[int] = []

    def lies_if_first(index: int) -> Lie:
        """The two that are no part of the chain are auditor and third peer, in an order that is not known."""

        def lie(step_id: int, hidden: Tensor) -> Tensor:
            if not auditors:
                auditors.append(index)
            return hidden + torch.randn_like(hidden) if auditors[0] == index else hidden

        return lie

    for index in (2, 3):
        peers.liars[index].lie = lies_if_first(index)
    with use(peers, checkpoint) as client:
        assert torch.equal(client.answer(), wanted)
        assert client.chain == peers.ids[:2]
        assert client.swarm.blame.avoided() == {peers.ids[auditors[0]]}
        assert not any("made again" in event for event in client.events), client.events


def test_where_two_differ_and_nobody_else_is_there_it_is_said(checkpoint: Path, peers: Peers) -> None:
    peers.liars[LIAR].lie = lies_from(3)
    with use(peers, checkpoint, hosts=(0, 1, 2)) as client:
        client.answer()
        assert any("nobody else serves these blocks" in event for event in client.events), client.events
        assert not any("made again" in event for event in client.events)


@pytest.mark.parametrize(("codec", "blocks", "audited"), [("none", "all", 2), ("int8", "0:3", 1)])
def test_a_client_that_has_the_blocks_itself_audits_alone(
    checkpoint: Path, peers: Peers, codec: str, blocks: str, audited: int
) -> None:
    opened = [host.sessions.opened for host in peers.hosts]
    settings: dict[str, Any] = {"codec": codec, "audit_blocks": blocks, "speculate": "off"}
    with use(peers, checkpoint, (0, LIAR), **settings) as client, client.model.session() as session:
        client.answer()
        auditor = cast(Session, client.model.blocks.session_of(session.cache)).auditor
        assert auditor.is_settled and not client.swarm.blame.avoided() and not client.events, client.events
        assert auditor.stats.tokens >= audited * (IDS.shape[1] + NEW_TOKENS - 2), auditor.stats
        assert bool(auditor.stats.unaudited) == (audited < 2), "nobody else serves the other blocks"
    assert sum(host.sessions.opened for host in peers.hosts) == sum(opened) + 2, "those of the answer"


def test_whoever_computes_otherwise_than_the_client_itself_lies(checkpoint: Path, peers: Peers, wanted: Tensor) -> None:
    """One replica, which takes over: of two that differ, nobody else could say which one lies."""
    peers.liars[LIAR].lie = lies_from(6)
    with use(peers, checkpoint, (0, 1, 2), audit_blocks="3:6") as client:
        assert torch.equal(client.answer(), wanted)
        assert client.swarm.blame.avoided() == {peers.ids[LIAR]}
        assert any("did not compute what this client did" in event for event in client.events), client.events


@pytest.mark.parametrize("blocks", ["some", "4:9"])
def test_blocks_that_the_model_has_not_are_the_users_mistake(checkpoint: Path, peers: Peers, blocks: str) -> None:
    with pytest.raises(UserError), use(peers, checkpoint, audit_blocks=blocks):
        pass


@pytest.mark.slow
def test_who_computes_differently_than_it_signed_is_found_by_what_it_recalls(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hop's outputs are recalled from it: they must be those that it signed."""
    host = peers.hosts[0]
    compute, honestly = cast(Any, host.house).compute, host.house.compute.run

    async def run(function: Any, *arguments: Any) -> Any:
        found = await honestly(function, *arguments)
        if getattr(function, "__name__", "") != "recall" or not found:
            return found
        (part, *others) = found[0].parts
        return [replace(found[0], parts=(replace(part, payload=bytes(len(part.payload))), *others)), *found[1:]]

    monkeypatch.setattr(compute, "run", run)
    with use(peers, checkpoint) as client:
        assert torch.equal(client.answer(), wanted)
        assert client.swarm.blame.avoided() == {peers.ids[0]}
        assert any("recalls something else than it sent" in event for event in client.events), client.events


def test_who_signs_something_else_than_it_said_is_given_up(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipts = peers.hosts[LIAR].house.receipts
    rest = receipts.rest

    async def forged(session: Any) -> Any:
        session.lines.extend([replace(session.lines.popleft(), sent=b"x" * 16) for _ in range(len(session.lines))])
        return await rest(session)

    monkeypatch.setattr(receipts, "rest", forged)
    with use(peers, checkpoint, audit=0.2) as client:
        assert torch.equal(client.answer(max_new_tokens=40)[:, : wanted.shape[1]], wanted)
        assert peers.ids[LIAR] in client.swarm.blame.avoided()
        assert peers.ids[LIAR] not in client.chain


def test_what_is_changed_on_its_way_is_noticed_at_once(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = cast(Any, peers.hosts[0].house.links)
    push = links.push
    calls = []

    def changed(peer_id: str, edge: bytes, step: Step) -> Any:
        calls.append(step.step_id)
        payload = bytes(len(step.payload)) if len(calls) == 8 else step.payload
        return push(peer_id, edge, replace(step, payload=payload))

    monkeypatch.setattr(links, "push", changed)
    with use(peers, checkpoint, audit=0.0) as client:
        assert torch.equal(client.answer(), wanted)
        assert any("what was sent and what came differ" in event for event in client.events), client.events
        assert not any("made again" in event for event in client.events), "the step's result was never used"


@pytest.mark.parametrize("host", [0, LIAR], ids=["to the next peer", "to the client"])
def test_what_no_model_computes_is_refused_in_its_step(
    checkpoint: Path, peers: Peers, wanted: Tensor, host: int
) -> None:
    peers.liars[host].lie = lambda step_id, hidden: hidden * torch.nan if step_id == 6 else hidden
    with use(peers, checkpoint, audit=0.0) as client:
        assert torch.equal(client.answer(), wanted)
        assert peers.ids[host] in client.swarm.blame.avoided()
        assert any("activations up to nan" in event for event in client.events), client.events


def test_a_cache_of_the_callers_own_is_doubted(checkpoint: Path, peers: Peers) -> None:
    peers.liars[LIAR].lie = lies_from(3)
    with use(peers, checkpoint, speculate="off") as client, pytest.raises(Doubted) as caught:
        client.answer(past_key_values=RemoteCache())
    assert caught.value.position == IDS.shape[1] + 2
    assert caught.value.peer_id == peers.ids[LIAR]
