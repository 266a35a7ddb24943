"""Simulated clients: answers run through chains that `client.chain` chooses, meet dead peers, and go round them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from benchmarks.swarm_peers import Peer, Swarm
from benchmarks.swarm_scenario import rtt_ms
from benchmarks.swarm_world import World
from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.deadline import SHARED, StepTimes
from client.recovery import to_renew
from client.times import Times
from protocol.errors import BlocksMissing
from protocol.messages import Opened
from protocol.span import Span, missing_spans

CONFIG: Final = ClientConfig()
ANSWER_TOKENS: Final = 200
PROMPT_TOKENS: Final = 100
THINK_S: Final = 60.0


@dataclass(slots=True)
class Tally:
    """What became of the answers of all clients. Lists hold one entry per answer, or per failure."""

    answers: int = 0
    lost: int = 0
    waited: int = 0
    waited_s: float = 0.0
    dead_at_open: int = 0
    failures_s: list[float] = field(default_factory=list)
    handovers: int = 0
    step_ms: list[float] = field(default_factory=list)
    network_ms: list[float] = field(default_factory=list)
    hops: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """One answer on its way. `epoch` grows with each new chain, so that what was planned for the old one lapses."""

    number: int
    links: list[Link] = field(default_factory=list)
    tokens: float = 0.0
    step_s: float = 0.0
    going_since_s: float = 0.0
    epoch: int = 0
    waiting_since_s: float | None = None
    had_to_wait: bool = False
    notice_s: float = 0.0


class Client:
    """One user: asks, reads the answer, thinks, asks again."""

    def __init__(self, world: World, swarm: Swarm, number: int, tally: Tally) -> None:
        self._world = world
        self._swarm = swarm
        self._tally = tally
        self._rng = random.Random(world.rng.getrandbits(64))
        self._blame = Blame(CONFIG.avoid_s, clock=lambda: world.now_s)
        self._phase = number % world.scenario.phases
        self._where = (self._rng.uniform(0, world.scenario.world_ms), self._rng.uniform(0, world.scenario.world_ms))
        self._answers = 0
        self._number = number

    def think(self) -> None:
        """Ask again after a while."""
        self._world.at(self._world.now_s + self._rng.expovariate(1 / THINK_S), self._ask)

    def _ask(self) -> None:
        self._answers += 1
        self._go_on(Answer(number=self._number * 1_000_000 + self._answers), 0.0)

    # -- routes -------------------------------------------------------------------------------------------------------

    def _go_on(self, answer: Answer, lost_s: float) -> None:
        """Choose peers for the blocks that the answer has none for, and go on; wait where there are none to be had.

        Args:
            lost_s: what this interruption has cost so far.
        """
        kept = [link for link in answer.links if self._answers_now(link)]
        new: list[Link] = []
        try:
            for gap in missing_spans([link.span for link in kept], self._swarm.n_blocks):
                links, lost_s = self._living_chain(gap, lost_s)
                new += links
        except BlocksMissing:
            self._wait(answer, lost_s)
            return
        if answer.waiting_since_s is not None:
            self._tally.waited_s += self._world.counting * (self._world.now_s - answer.waiting_since_s)
            answer.waiting_since_s = None
        answer.links = sorted(kept + new, key=lambda link: link.span)
        self._start(answer, lost_s + replay_s(answer.links, new, self._swarm, PROMPT_TOKENS + int(answer.tokens)))

    def _living_chain(self, wanted: Span, lost_s: float) -> tuple[list[Link], float]:
        """A chain whose peers all answer; each dead one costs a try, is blamed, and another chain is chosen."""
        while True:
            links = self._choose(wanted)
            dead = [link for link in links if not self._answers_now(link)]
            if not dead:
                return links, lost_s
            self._tally.dead_at_open += self._world.counting
            for link in dead:
                self._blame.add(link.peer.peer_id)
            # All are tried at once: the slowest refusal is waited for.
            lost_s += max(self._refusal_s(link) for link in dead)

    def _choose(self, wanted: Span) -> list[Link]:
        """Raises BlocksMissing: some blocks have nobody but peers that failed just now."""
        reading = self._swarm.read(self._world.now_s, self._phase)
        peers = reading.view.online(self._swarm.fingerprint)
        rtts_ms = {p.peer_id: rtt_ms(self._world.scenario, self._where, self._swarm.where[p.peer_id]) for p in peers}
        avoid = self._blame.avoided()
        links = choose_chain(peers, wanted, times=Times(rtts_ms=rtts_ms), avoid=avoid, rng=self._rng)
        if any(link.peer.peer_id in avoid for link in links):
            raise BlocksMissing("only peers that failed lately serve these blocks")
        return list(links)

    def _answers_now(self, link: Link) -> bool:
        """Is the peer there, and does it still serve these blocks?"""
        peer = self._swarm.peers.get(link.peer.peer_id)
        return peer is not None and peer.serves and peer.record.span.covers(link.span)

    def _refusal_s(self, link: Link) -> float:
        if link.peer.peer_id in self._swarm.vanished:
            return CONFIG.open_timeout_s
        return rtt_ms(self._world.scenario, self._where, self._swarm.where[link.peer.peer_id]) / 1000

    def _wait(self, answer: Answer, lost_s: float) -> None:
        now_s = self._world.now_s
        if answer.waiting_since_s is None:
            answer.waiting_since_s = now_s
            self._tally.waited += self._world.counting and not answer.had_to_wait
            answer.had_to_wait = True
        if now_s - answer.waiting_since_s >= CONFIG.wait_s:
            self._tally.lost += self._world.counting
            self._tally.waited_s += self._world.counting * (now_s - answer.waiting_since_s)
            self._forget(answer)
            self.think()
            return
        self._world.at(self._swarm.next_read_s(now_s, self._phase), self._go_on, answer, lost_s)

    # -- an answer's steps --------------------------------------------------------------------------------------------

    def _start(self, answer: Answer, lost_s: float) -> None:
        network_ms, compute_ms = self._times_ms(answer)
        answer.epoch += 1
        answer.step_s = (network_ms + compute_ms) / 1000
        answer.going_since_s = self._world.now_s + lost_s
        if not answer.tokens and answer.epoch == 1 and self._world.counting:
            self._tally.step_ms.append(network_ms + compute_ms)
            self._tally.network_ms.append(network_ms)
            self._tally.hops.append(len(answer.links))
        elif self._world.counting and lost_s:
            self._tally.failures_s.append(lost_s + answer.notice_s)
        answer.notice_s = 0.0
        for link in answer.links:
            self._swarm.peers[link.peer.peer_id].watchers[answer.number] = lambda peer, told: self._lose(
                answer, peer, told
            )
        left = ANSWER_TOKENS - answer.tokens
        self._world.at(answer.going_since_s + left * answer.step_s, self._finish, answer, answer.epoch)

    def _times_ms(self, answer: Answer) -> tuple[float, float]:
        """One step along the chain: on the way, and computing."""
        places = [self._where, *(self._swarm.where[link.peer.peer_id] for link in answer.links), self._where]
        scenario = self._world.scenario
        network_ms = sum(rtt_ms(scenario, a, b) / 2 for a, b in pairwise(places))
        compute_ms = sum(
            len(link.span) / self._swarm.peers[link.peer.peer_id].machine.blocks_per_s * 1000 for link in answer.links
        )
        return network_ms, compute_ms

    def _lose(self, answer: Answer, peer: Peer, told: bool) -> None:
        """A peer of the chain stops: go round it. One that says so goes on until another has taken over."""
        now_s = self._world.now_s
        if answer.waiting_since_s is not None:
            return
        gone_s = max(0.0, now_s - answer.going_since_s)
        answer.tokens = min(ANSWER_TOKENS, answer.tokens + math.floor(gone_s / answer.step_s))
        answer.epoch += 1
        self._forget(answer)
        answer.links = [link for link in answer.links if link.peer.peer_id != peer.peer_id]
        if told:
            self._tally.handovers += self._world.counting
            self._go_on(answer, 0.0)
            return
        self._blame.add(peer.peer_id)
        crashed_s = rtt_ms(self._world.scenario, self._where, self._swarm.where[peer.peer_id]) / 1000
        vanished = peer.peer_id in self._swarm.vanished
        silence_s = StepTimes(answer.step_s).allowance_s(1) + CONFIG.probe_timeout_s
        answer.notice_s = silence_s if vanished else crashed_s
        self._world.at(now_s + answer.notice_s, self._replace, answer, answer.epoch)

    def _replace(self, answer: Answer, epoch: int) -> None:
        if answer.epoch == epoch:
            self._go_on(answer, 0.0)

    def _forget(self, answer: Answer) -> None:
        for link in answer.links:
            peer = self._swarm.peers.get(link.peer.peer_id)
            if peer is not None:
                peer.watchers.pop(answer.number, None)

    def _finish(self, answer: Answer, epoch: int) -> None:
        if answer.epoch != epoch:
            return
        self._tally.answers += self._world.counting
        self._forget(answer)
        self.think()


def replay_s(chain: Sequence[Link], new: Sequence[Link], swarm: Swarm, tokens: int) -> float:
    """How long it takes until a chain with `new` peers in it can go on: `client.recovery` says who begins anew.

    Each of these computes all tokens so far, one peer after the other, since each needs what the one before it puts
    out. All peers have kept the outputs of their steps, and their lines are no bottleneck.
    """
    fresh = Opened(next_step=0, tokens=0, kv_tokens_left=0, dtype="float32")
    kept = Opened(next_step=tokens, tokens=tokens, kv_tokens_left=0, dtype="float32")
    states = [fresh if link in new else kept for link in chain]
    told = {index for index, state in enumerate(states) if state is fresh} | set(to_renew(states, tokens))
    return sum(
        tokens * len(chain[i].span) / (SHARED * swarm.peers[chain[i].peer.peer_id].machine.blocks_per_s) for i in told
    )


def start_clients(world: World) -> Tally:
    """Clients ask from the warm-up on, spread over the swarm's models. Returns what they will count."""
    tally = Tally()
    for number in range(world.scenario.clients):
        client = Client(world, world.swarms[number % len(world.swarms)], number, tally)
        world.at(world.scenario.warm_up_h * 1800, client.think)
    return tally
