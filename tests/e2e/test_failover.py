"""Law 2 over real processes: a peer killed with -9 at any step of an answer costs time, and no token.

One swarm with two peers for each half of the blocks. Whatever a test kills is started anew in the background, while the
next tests go on.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from client.chain import Link
from client.hop import Hop
from client.model import SwarmModel, SwarmModelForCausalLM
from client.open_chain import OpenChain
from client.session import Session
from client.stats import SessionStats
from protocol.journal import Entry
from protocol.messages import Step, StepResult
from tests.e2e.support import answers_at_length, unsplit
from tests.processes import START_S, LocalSwarm, PeerProcess, at_home, swarm, until

HALVES = ("0:3", "3:6")
NEW_TOKENS = 20
LAST_STEP = NEW_TOKENS - 1  # step 0 is the prefill, each later one a token
CHUNK = 8
PROMPT = torch.randint(3, 250, (1, 3 * CHUNK), generator=torch.Generator().manual_seed(5))

SEED = int(os.environ.get("E2E_SEED", secrets.randbits(32)))
"""Fresh in each run; E2E_SEED repeats one."""

Moment = Literal["before", "during", "after"]


@dataclass
class Faulty:
    """A client of a swarm of which peers die, and what the answer must be."""

    peers: LocalSwarm
    folder: Path
    client: SwarmModel
    unsplit: Any
    events: list[str] = field(default_factory=list)
    on_event: Callable[[str], None] = lambda text: None

    def heard(self, text: str) -> None:
        self.events.append(text)
        self.on_event(text)

    def other(self, **settings: Any) -> SwarmModel:
        """A client with other settings, in the same swarm."""
        model = SwarmModelForCausalLM.from_pretrained(
            str(self.folder), swarm=self.client.swarm, on_event=self.heard, **settings
        )
        model.generation_config = self.client.generation_config
        return model

    def expected(self, seed: int) -> Tensor:
        """The undisturbed answer."""
        return generated(self.unsplit, seed)

    def answer(self, seed: int, model: SwarmModel | None = None) -> tuple[Tensor, SessionStats]:
        """The swarm's answer, and what happened to its session."""
        model = model or self.client
        with model.session() as session:
            tokens = generated(model, seed)
            behind = model.blocks.session_of(session.cache)
            assert behind is not None
            return tokens, behind.stats

    def settle(self, half: str) -> None:
        """Until two peers serve `half`, and the client knows where."""
        serving = [peer.ready() for peer in self.peers.peers if peer.is_alive and _half(peer) == half]
        while len(serving) < 2:
            serving.append(self.peers.start(half).ready())
        model = self.client

        def known() -> bool:
            view = model.swarm.refresh()
            addresses = {address for m in view.models for p in view.online(m.fingerprint) for address in p.addresses}
            return all(peer.address in addresses for peer in serving)

        until(known, f"the client to know the peers of {half}")
        self.events.clear()


@pytest.fixture(scope="module", name="faulty")
def _faulty(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder, home = checkpoint("llama"), tmp_path_factory.mktemp("home")
    with (
        at_home(home),
        swarm(home, folder, [half for half in HALVES for _ in range(2)]) as peers,
        SwarmModelForCausalLM.from_pretrained(
            str(folder),
            join=peers.join,
            codec="none",
            wait_s=2 * START_S,  # for a peer that is only being started, perhaps on a busy machine
            on_event=lambda text: faulty.heard(text),
        ) as client,
    ):
        faulty = Faulty(peers, folder, client, unsplit(folder))
        for model in (faulty.client, faulty.unsplit):
            answers_at_length(model)
        yield faulty


def generated(model: Any, seed: int) -> Tensor:
    """Sampled, so that a wrong value anywhere in the chain's caches would soon give other tokens."""
    torch.manual_seed(seed)
    tokens: Tensor = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=50)
    return tokens


def _half(peer: PeerProcess) -> str:
    return peer.name.split("--blocks ")[1].split()[0]


@dataclass
class Fault:
    """What happens to the peer that runs blocks `half` at step `at`: before the step is sent to it, while it works on
    it, or after its result."""

    half: str
    at: int
    moment: Moment
    do: Callable[[PeerProcess], None]
    victim: PeerProcess | None = None


@contextmanager
def struck_by(fault: Fault, peers: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this context the fault happens, once; afterwards it has."""
    send, check = OpenChain.send, Session._check

    def strikes(links: Sequence[Link], step_id: int, *moments: Moment) -> bool:
        if step_id != fault.at or fault.moment not in moments or fault.victim is not None:
            return False
        (link,) = (link for link in links if str(link.span) == fault.half)
        fault.victim = peers.peer(link.peer.peer_id)
        return True

    async def _send(chain: OpenChain, hop: Hop, step: Step) -> None:
        if strikes(chain.links, step.step_id, "before"):
            assert fault.victim is not None
            fault.do(fault.victim)
        if not strikes(chain.links, step.step_id, "during"):
            await send(chain, hop, step)
            return
        assert fault.victim is not None
        fault.victim.send(signal.SIGSTOP)  # it cannot be done with the step before it dies
        await send(chain, hop, step)
        await asyncio.sleep(0.05)  # the step is on its way to it
        fault.do(fault.victim)

    def _check(session: Session, result: StepResult, entry: Entry, hop: Hop) -> None:
        check(session, result, entry, hop)
        if strikes(session.chain, entry.step_id, "after"):
            assert fault.victim is not None
            fault.do(fault.victim)

    with monkeypatch.context() as patch:
        patch.setattr(OpenChain, "send", _send)
        patch.setattr(Session, "_check", _check)
        yield
    assert fault.victim is not None, "the fault did not happen"


def killed(faulty: Faulty, fault: Fault, monkeypatch: pytest.MonkeyPatch, model: SwarmModel | None = None) -> Tensor:
    """The answer to which `fault` happens."""
    faulty.settle(fault.half)
    with struck_by(fault, faulty.peers, monkeypatch):
        tokens, stats = faulty.answer(SEED, model)
    faulty.peers.start(fault.half)
    assert stats.reroutes >= 1
    assert any("is lost" in event for event in faulty.events)
    return tokens


def drawn(rng: random.Random, at: int, moments: tuple[Moment, ...] = get_args(Moment)) -> Fault:
    fault = Fault(rng.choice(HALVES), at, rng.choice(moments), PeerProcess.kill)
    print(f"E2E_SEED={SEED}: kill -9 of the peer of blocks {fault.half} {fault.moment} step {fault.at}")
    return fault


@pytest.mark.parametrize("half", HALVES)
def test_killed_at_step_0_before_the_prefill_is_sent(
    faulty: Faulty, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(half, 0, "before", PeerProcess.kill)
    assert torch.equal(killed(faulty, fault, monkeypatch), faulty.expected(SEED))


@pytest.mark.parametrize("half", HALVES)
def test_killed_during_the_prefill(faulty: Faulty, half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault(half, 0, "during", PeerProcess.kill)
    assert torch.equal(killed(faulty, fault, monkeypatch), faulty.expected(SEED))


def test_killed_between_the_chunks_of_a_prefill(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = faulty.other(codec="none", prefill_tokens=CHUNK)
    fault = drawn(random.Random(SEED), at=1)
    assert torch.equal(killed(faulty, fault, monkeypatch, chunked), faulty.expected(SEED))


def test_killed_at_step_1(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = drawn(random.Random(SEED + 1), at=1)
    assert torch.equal(killed(faulty, fault, monkeypatch), faulty.expected(SEED))


@pytest.mark.parametrize("index", range(5))
def test_killed_at_a_random_later_step(faulty: Faulty, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(SEED + 2 + index)
    fault = drawn(rng, at=rng.randrange(2, LAST_STEP))
    assert torch.equal(killed(faulty, fault, monkeypatch), faulty.expected(SEED))


def test_killed_with_the_default_codec(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    model = faulty.other()
    undisturbed, stats = faulty.answer(SEED, model)
    assert stats.reroutes == 0
    rng = random.Random(SEED + 7)
    fault = drawn(rng, at=rng.randrange(2, LAST_STEP))
    assert torch.equal(killed(faulty, fault, monkeypatch, model), undisturbed)


def test_frozen_and_awake_again_later(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that was given up must not disturb the session when it comes back."""
    model = faulty.other(codec="none")
    fault = Fault("3:6", 5, "during", lambda peer: None)  # SIGSTOP is all that happens
    faulty.settle(fault.half)
    with model.session() as session:
        with struck_by(fault, faulty.peers, monkeypatch):
            first = generated(model, SEED)
        assert fault.victim is not None
        fault.victim.send(signal.SIGCONT)
        second = generated(model, SEED)
        behind = model.blocks.session_of(session.cache)
        assert behind is not None
        assert behind.stats.reroutes >= 1
    assert torch.equal(first, faulty.expected(SEED))
    assert torch.equal(second, faulty.expected(SEED))


def test_all_replicas_killed_and_a_new_peer_comes(faulty: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits, says which blocks are missing, and goes on."""
    half = random.Random(SEED + 8).choice(HALVES)
    print(f"E2E_SEED={SEED}: kill -9 of all peers of blocks {half}")

    def kill_all(victim: PeerProcess) -> None:
        for peer in faulty.peers.peers:
            if _half(peer) == half:
                peer.kill()

    waits = threading.Event()

    def start_when_it_waits(text: str) -> None:
        if text.startswith("waiting:") and not waits.is_set():
            waits.set()
            faulty.peers.start(half)

    faulty.settle(half)
    monkeypatch.setattr(faulty, "on_event", start_when_it_waits)
    with struck_by(Fault(half, 4, "before", kill_all), faulty.peers, monkeypatch):
        tokens, stats = faulty.answer(SEED)
    assert waits.is_set()
    assert any(event.startswith(f"waiting: blocks {half} have no peer") for event in faulty.events)
    assert stats.reroutes >= 1
    assert torch.equal(tokens, faulty.expected(SEED))
