"""A simulated swarm: machines, peers, the DHT between them, and a clock that jumps from event to event.

What decides is the project's own code: `peer.placement` says where peers go, `dht.view` merges what they announce, and
the simulated clients (`benchmarks.swarm_clients`) choose chains with `client.chain`. Simulated are the machines (speed,
memory, line, place), the time that loading takes, and the DHT's transport. Signatures are left out.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

from benchmarks.swarm_peers import DHT, Peer, Reading, Swarm
from benchmarks.swarm_scenario import Machine, Scenario, make_machine, rtt_ms
from dht.announcer import TOMBSTONE_MARGIN_S
from dht.record import PeerRecord
from peer.balance import is_safe, may_go
from peer.claim import LOOKS, PAUSE_S, rivals
from peer.first_span import UNKNOWN_BLOCKS_PER_S
from peer.neighbours import likely_next
from peer.placement import MovePolicy, Outlook, Placed, choose_span, lack, next_check_s, outlook
from protocol.span import Span

KV_TOKENS: Final = 65536
EXPIRED_S: Final = 1e-3
"""So long after a record expired, it surely has."""
PING_EVERY_S: Final = 900.0
"""Between two measurements of a peer's round trips to likely next ones."""


class World:
    """All swarms, the clock and the queue of events. Everything random comes from `seed`."""

    def __init__(self, scenario: Scenario, seed: int, policy: MovePolicy | None = None) -> None:
        self.scenario = scenario
        self.policy = policy or MovePolicy()
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.moves = 0
        self.moves_for_replicas = 0
        self.joins = 0
        self.leaves = 0
        self.filled_twice = 0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._events = 0
        machines = [make_machine(scenario, self.rng) for _ in range(scenario.peers)]
        self.memory_blocks = sum(machine.num_blocks for machine in machines)
        self.mean_load_s = sum(m.num_blocks**2 * m.load_block_s for m in machines) / self.memory_blocks
        """Of a replica of a block: long spans hold more of them, and take longer."""
        replicas = scenario.replicas * (1 + scenario.spare)
        models = max(1, round(self.memory_blocks / (scenario.n_blocks * replicas))) if replicas else 1
        self.n_blocks = int(self.memory_blocks / (models * replicas)) if replicas else scenario.n_blocks
        """Of each model: about as many as the scenario says, so that memory is enough for just so many replicas."""
        started_s = scenario.warm_up_h * 3600
        self.swarms = [Swarm(f"model-{index}", self.n_blocks, scenario, started_s) for index in range(models)]
        self._start(machines)

    def _start(self, machines: Iterable[Machine]) -> None:
        """Machines come one after the other within ten minutes, each to the model with the least memory so far."""
        memory = dict.fromkeys(range(len(self.swarms)), 0)
        for machine in sorted(machines, key=lambda machine: -machine.num_blocks):
            least = min(memory, key=lambda index: (memory[index], index))
            memory[least] += machine.num_blocks
            self.at(self.rng.uniform(0, 600), self._join, machine, self.swarms[least])

    def at(self, when_s: float, what: Callable[..., None], *args: Any) -> None:
        """Do something later."""
        self._events += 1
        heapq.heappush(self._queue, (when_s, self._events, what, args))

    def run(self, hours: float | None = None) -> None:
        """Let the time pass: to the scenario's end, or for so many hours."""
        end_s = (self.scenario.hours + self.scenario.warm_up_h) * 3600 if hours is None else self.now_s + hours * 3600
        while self._queue and self._queue[0][0] <= end_s:
            self.now_s, _, what, args = heapq.heappop(self._queue)
            what(*args)
        self.now_s = end_s
        for swarm in self.swarms:
            swarm.meter.advance(end_s)

    @property
    def counting(self) -> bool:
        return self.now_s >= self.scenario.warm_up_h * 3600

    # -- a peer's life ------------------------------------------------------------------------------------------------

    def _join(self, machine: Machine, swarm: Swarm) -> None:
        self.joins += self.counting
        peer = Peer(f"peer-{self._events}", machine, swarm, self.rng.randrange(self.scenario.phases))
        peer.record = PeerRecord(
            peer_id=peer.peer_id,
            fingerprint=swarm.fingerprint,
            n_blocks=swarm.n_blocks,
            span=self._weakest(peer, swarm.read(self.now_s, peer.phase).placed),
            state="joining",
            addresses=("192.0.2.1:1",),
            certificate_der=b"",
            kv_tokens_left=KV_TOKENS,
            kv_tokens_total=KV_TOKENS,
            codecs=("int8",),
            started_at=self.now_s,
        )
        swarm.peers[peer.peer_id] = peer
        swarm.where[peer.peer_id] = machine.where
        self._announce(peer)
        self.at(self.now_s + DHT.announce_every_s, self._heartbeat, peer)
        self._after_pause(self._settle, peer, LOOKS)
        if math.isfinite(self.scenario.mean_stay_s):
            stay_s = self.rng.expovariate(1 / self.scenario.mean_stay_s)
            silent = self.rng.random() < self.scenario.silent
            self.at(self.now_s + stay_s, self.leave, peer, silent)

    def _weakest(self, peer: Peer, others: Iterable[Placed]) -> Span:
        """Where the swarm needs a newcomer most, as `peer.first_span.FirstSpan` asks it."""
        known = [other for other in others if other.peer_id != peer.peer_id]
        speed = statistics.median([o.blocks_per_s for o in known] or [UNKNOWN_BLOCKS_PER_S])
        return choose_span(peer.swarm.n_blocks, peer.swarm.cuts, known, peer.machine.num_blocks, speed)

    def _settle(self, peer: Peer, looks: int) -> None:
        """As `peer.claim.settle`: did others come first with these blocks? Then to other ones; else load."""
        if not peer.alive or peer.record.state != "joining":
            return
        reading = peer.swarm.read_anew(self.now_s)
        mine, others = reading.mine_and_others(peer.peer_id)
        if looks and mine is not None and rivals(mine, others):
            span = self._weakest(peer, reading.placed)
            if span != peer.record.span:
                self._change(peer, span=span)
                self._after_pause(self._settle, peer, looks - 1)
                return
        span = peer.record.span
        self.at(self.now_s + len(span) * peer.machine.load_block_s, self._online, peer, span)

    def _after_pause(self, what: Callable[..., None], *args: Any) -> None:
        """Do something when the claims of others have arrived."""
        self.at(self.now_s + self.rng.uniform(*PAUSE_S), what, *args)

    def _online(self, peer: Peer, span: Span) -> None:
        """It has loaded, or stays after all, and takes sessions from now on."""
        if not peer.alive or peer.leaving:
            return
        if span != peer.record.span or peer.record.state == "joining":
            peer.came_s = self.now_s
        peer.swarm.meter.serve(self.now_s, span, peer.machine.blocks_per_s)
        self._change(peer, span=span, moving_to=None, state="online")
        self._check_later(peer)

    def leave(self, peer: Peer, silent: bool, *, replaced: bool = True) -> None:
        """The peer goes, with or without notice; a stranger comes."""
        if not peer.alive or peer.leaving:
            return
        self.leaves += self.counting
        served = peer.serves
        peer.leaving = True
        if silent:
            if self.rng.random() < self.scenario.vanish:
                peer.swarm.vanished.add(peer.peer_id)
            self._gone(peer)
            for phase in range(self.scenario.phases):
                self.at(peer.record.expires_at + EXPIRED_S, self._look, peer.swarm, phase)
        else:
            self._change(peer, state="draining", moving_to=None)
            self.at(self.now_s + self.scenario.drain_s, self._say_goodbye, peer)
        if served:
            self._stop_serving(peer, told=not silent)
        if replaced:
            self.at(self.now_s, self._join, peer.machine, peer.swarm)

    def _say_goodbye(self, peer: Peer) -> None:
        self._change(peer, state="offline")
        self._gone(peer)

    def _gone(self, peer: Peer) -> None:
        peer.alive = False
        del peer.swarm.peers[peer.peer_id]

    def _stop_serving(self, peer: Peer, *, told: bool) -> None:
        """The peer, which is gone or says that it is draining, serves no more; its sessions learn of it."""
        peer.swarm.meter.unserve(self.now_s, peer.record.span, peer.machine.blocks_per_s)
        watchers, peer.watchers = list(peer.watchers.values()), {}
        for watcher in watchers:
            watcher(peer, told)

    # -- moving: as `peer.balance` and `peer.hosting` have it, where memory holds no second span ----------------------

    def _check_later(self, peer: Peer, gap: bool | None = None) -> None:
        """Look again in a while, or in a moment if it could help (`gap`; None: as its readers know)."""
        if gap is None:
            gap = peer.peer_id in peer.swarm.read(self.now_s, peer.phase).helpers
        at_s = self.now_s + next_check_s(self.policy, self.rng, gap=gap)
        if gap and self.now_s < peer.check_at_s <= at_s:
            return
        peer.check_at_s = at_s
        self.at(at_s, self._check, peer, at_s)

    def _check(self, peer: Peer, at_s: float) -> None:
        if at_s != peer.check_at_s or not peer.serves or peer.record.moving_to:
            return
        peer.check_at_s = math.inf
        # A real peer reads anew at each look. That is slow, so here only one that would move does.
        found = self._outlook(peer, peer.swarm.read(self.now_s, peer.phase))
        reading = peer.swarm.read_anew(self.now_s) if found.span else None
        found = self._outlook(peer, reading) if reading else found
        if reading and found.span:
            mine, others = reading.mine_and_others(peer.peer_id)
            if mine is not None and is_safe(mine, found.span, others):
                self._change(peer, moving_to=found.span)
                self._after_pause(self._drain, peer, found.soon)
                return
        self._check_later(peer, found.soon)

    def _outlook(self, peer: Peer, reading: Reading) -> Outlook:
        return outlook(
            Placed(peer.peer_id, peer.record.span, self._measured(peer)),
            [other for other in reading.placed if other.peer_id != peer.peer_id],
            peer.swarm.n_blocks,
            peer.swarm.cuts,
            peer.machine.num_blocks,
            self.policy,
            rng=self.rng,
            settled=self.now_s - peer.came_s >= self.policy.min_stay_s,
        )

    def _drain(self, peer: Peer, fills: bool) -> None:
        """The claim is known: does it still hold?"""
        if not peer.serves or peer.record.moving_to is None:
            return
        if not self._may_go(peer):
            self._change(peer, moving_to=None)
            self._check_later(peer)
            return
        self.filled_twice += self.counting and fills and self._is_filled_already(peer, peer.record.moving_to)
        self._change(peer, state="draining")
        self._stop_serving(peer, told=True)
        self.at(self.now_s + self.scenario.drain_s, self._load, peer, fills)

    def _load(self, peer: Peer, fills: bool) -> None:
        target = peer.record.moving_to
        if not peer.alive or target is None:
            return
        if not self._may_go(peer):
            self._online(peer, peer.record.span)
            return
        self.moves += self.counting
        self.moves_for_replicas += self.counting and fills
        kept = peer.record.span.overlap(target)
        missing = len(target) - (len(kept) if kept else 0)
        self._change(peer, span=target, moving_to=None, state="joining")
        self.at(self.now_s + missing * peer.machine.load_block_s, self._online, peer, target)

    def _may_go(self, peer: Peer) -> bool:
        mine, others = peer.swarm.read_anew(self.now_s).mine_and_others(peer.peer_id)
        target = peer.record.moving_to
        return mine is not None and target is not None and mine.moving_to == target and may_go(mine, target, others)

    def _is_filled_already(self, mover: Peer, target: Span) -> bool:
        """Would the blocks lack no more replicas if `mover` stayed, with what others, in truth, are about to load?"""
        others = []
        for peer in mover.swarm.peers.values():
            if peer is not mover and not peer.leaving:
                others.append(Placed(peer.peer_id, peer.record.moving_to or peer.record.span, 1.0))
        stays = Placed(mover.peer_id, mover.record.span, 1.0)
        goes = Placed(mover.peer_id, target, 1.0)
        n_blocks = mover.swarm.n_blocks
        return lack(n_blocks, (*others, goes)) >= lack(n_blocks, (*others, stays))

    # -- announcing ---------------------------------------------------------------------------------------------------

    def _change(self, peer: Peer, **changes: Any) -> None:
        """Another record, announced at once."""
        peer.record = replace(peer.record, **changes)
        self._announce(peer)

    def _announce(self, peer: Peer) -> None:
        """Something changed that all should know."""
        self._stamp(peer)
        self._news(peer.swarm)

    def _stamp(self, peer: Peer) -> None:
        """As `dht.announcer.Announcer` stamps and publishes: sequence and expiry only ever grow."""
        record = peer.record
        tokens_per_s = self._measured(peer) / len(record.span) if record.state == "online" else record.tokens_per_s
        peer.record = _with(
            record,
            tokens_per_s=tokens_per_s,
            step_ms=None if tokens_per_s is None else 1000.0 / tokens_per_s,
            sequence=max(record.sequence + 1, int(self.now_s * 1e9)),
            expires_at=max(record.expires_at + TOMBSTONE_MARGIN_S, self.now_s + DHT.expiry_s),
        )
        peer.swarm.publish(peer.record, self.now_s)

    def _heartbeat(self, peer: Peer) -> None:
        if peer.alive:
            if self.now_s >= peer.ping_at_s:
                self._ping(peer)
            self._stamp(peer)
            self.at(self.now_s + DHT.announce_every_s, self._heartbeat, peer)

    def _ping(self, peer: Peer) -> None:
        """Measure the round trips to likely next peers, as `peer.neighbours.Neighbours` does."""
        peer.ping_at_s = self.now_s + PING_EVERY_S
        online = peer.swarm.read(self.now_s, peer.phase).view.online(peer.swarm.fingerprint)
        others = likely_next(
            (other for other in online if other.peer_id != peer.peer_id),
            peer.record.span,
            dict(peer.record.rtts_ms),
            self.rng,
        )
        where = peer.swarm.where
        rtts = sorted((rtt_ms(self.scenario, peer.machine.where, where[o.peer_id]), o.peer_id) for o in others)
        peer.record = replace(peer.record, rtts_ms=tuple((peer_id, ms) for ms, peer_id in rtts))

    def _news(self, swarm: Swarm) -> None:
        """Who will serve what has changed: peers see it at their next read, and those who could help look again."""
        for phase in range(self.scenario.phases):
            self.at(swarm.next_read_s(self.now_s, phase), self._look, swarm, phase)

    def _look(self, swarm: Swarm, phase: int) -> None:
        helpers = swarm.read(self.now_s, phase).helpers
        for peer in swarm.peers.values() if helpers else ():
            if peer.phase == phase and peer.serves and peer.peer_id in helpers:
                self._check_later(peer, gap=True)

    def _measured(self, peer: Peer) -> float:
        return peer.machine.blocks_per_s * max(0.1, 1 + self.rng.gauss(0, self.scenario.noise))


def _with(record: PeerRecord, **changes: Any) -> PeerRecord:
    """As `dataclasses.replace`, which would take a fifth of the time: millions of announcements change four fields."""
    twin = object.__new__(PeerRecord)
    twin.__dict__.update(record.__dict__, **changes)
    return twin
