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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from benchmarks.swarm_meter import Meter
from dht.announcer import TOMBSTONE_MARGIN_S
from dht.config import DhtConfig
from dht.record import PeerRecord
from dht.view import Findings, SwarmView, make_view, merge
from peer.balance import is_safe, may_go
from peer.claim import LOOKS, PAUSE_S, rivals
from peer.first_span import UNKNOWN_BLOCKS_PER_S
from peer.neighbours import likely_next
from peer.placement import MovePolicy, Outlook, Placed, choose_span, could_help, lack, next_check_s, outlook, placed
from protocol.span import Span

DHT: Final = DhtConfig()
KV_TOKENS: Final = 65536
EXPIRED_S: Final = 1e-3
"""So long after a record expired, it surely has."""
PING_EVERY_S: Final = 900.0
"""Between two measurements of a peer's round trips to likely next ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated. Times in seconds unless named otherwise.

    Attributes:
        peers: machines; one that leaves is followed at once by a stranger with a machine of the same make, who knows
            nothing of the place that became free.
        mean_stay_h: mean of the exponentially distributed stay; 0: nobody leaves.
        silent: share of the leavers that leave without notice.
        replicas: so many models of `n_blocks` are served that the memory of all machines is `replicas` times their
            blocks, and `spare` more; 0: one model, served by all.
        least_blocks, most_blocks: memory of a machine, log-uniform between.
        speed_spread, line_spread: sigma of the log-normal speed and bandwidth.
        noise: relative error of the throughput that a peer measures.
        vanish: share of those without notice whose machine is gone (nothing answers); the others' process alone died,
            and their connections break at once.
        phases: readers of the DHT read at so many different moments; those of one moment share a view.
        warm_up_h: so long the swarm runs before anything is counted.
    """

    peers: int = 1000
    hours: float = 24.0
    mean_stay_h: float = 2.0
    silent: float = 0.5
    replicas: float = 2.0
    spare: float = 0.2
    n_blocks: int = 80
    least_blocks: int = 2
    most_blocks: int = 16
    speed_blocks_per_s: float = 800.0
    speed_spread: float = 0.5
    vanish: float = 0.5
    block_mib: float = 220.0
    line_mib_per_s: float = 25.0
    line_spread: float = 0.5
    noise: float = 0.05
    drain_s: float = 5.0
    world_ms: float = 100.0
    last_mile_ms: float = 4.0
    clients: int = 20
    phases: int = 1
    warm_up_h: float = 1.0

    @property
    def mean_stay_s(self) -> float:
        return self.mean_stay_h * 3600 if self.mean_stay_h else math.inf


@dataclass(frozen=True, slots=True)
class Machine:
    """What somebody shares. `x_ms`, `y_ms`: where it is, as the time light and routers take."""

    num_blocks: int
    blocks_per_s: float
    load_block_s: float
    x_ms: float
    y_ms: float

    @property
    def where(self) -> tuple[float, float]:
        return self.x_ms, self.y_ms


def rtt_ms(scenario: Scenario, one: tuple[float, float], other: tuple[float, float]) -> float:
    """The round trip between two places: there and back, and over the last mile at both ends."""
    return 2 * math.dist(one, other) + 4 * scenario.last_mile_ms


class Peer:
    """A machine in the swarm, from its coming to its leaving."""

    def __init__(self, peer_id: str, machine: Machine, swarm: Swarm, phase: int) -> None:
        self.peer_id = peer_id
        self.machine = machine
        self.swarm = swarm
        self.phase = phase
        self.alive = True
        self.leaving = False
        self.came_s = 0.0
        self.check_at_s = math.inf
        self.ping_at_s = 0.0
        self.watchers: dict[int, Callable[[Peer, bool], None]] = {}
        """Who is to be told when it stops serving: told the peer, and whether it says so itself."""
        self.record: PeerRecord

    @property
    def serves(self) -> bool:
        return self.alive and self.record.state == "online"


class Reading:
    """What the readers of one moment know of the DHT. Replaced when they read again."""

    def __init__(self, swarm: Swarm, findings: Findings, read_at_s: float) -> None:
        self.findings = findings
        self.read_at_s = read_at_s
        self._swarm = swarm

    @cached_property
    def next_expiry_s(self) -> float:
        return min((peer.expires_at for peer in self.findings.peers.values()), default=math.inf)

    @cached_property
    def view(self) -> SwarmView:
        return make_view(self.findings, self.read_at_s)

    @property
    def peers(self) -> tuple[PeerRecord, ...]:
        return self.view.peers(self._swarm.fingerprint)

    @cached_property
    def placed(self) -> tuple[Placed, ...]:
        return placed(self.peers, prior_blocks_per_s=self._swarm.prior_blocks_per_s)

    @cached_property
    def helpers(self) -> frozenset[str]:
        """Who could give blocks replicas that they lack."""
        return could_help(self._swarm.n_blocks, self._swarm.cuts, self.placed)

    def mine_and_others(self, peer_id: str) -> tuple[PeerRecord | None, list[PeerRecord]]:
        """As `peer.claim.refreshed` has it."""
        mine = next((peer for peer in self.peers if peer.peer_id == peer_id), None)
        return mine, [peer for peer in self.peers if peer.peer_id != peer_id]


class Swarm:
    """The peers of one model, and what the DHT holds of them."""

    def __init__(self, fingerprint: str, n_blocks: int, scenario: Scenario, started_s: float) -> None:
        self.fingerprint = fingerprint
        self.n_blocks = n_blocks
        self.cuts = tuple(range(n_blocks + 1))
        self.prior_blocks_per_s = scenario.speed_blocks_per_s
        self.peers: dict[str, Peer] = {}
        self.where: dict[str, tuple[float, float]] = {}
        """Of all peers that ever were."""
        self.vanished: set[str] = set()
        self.meter = Meter(n_blocks, started_s)
        self._phases = scenario.phases
        # The last one is of those who read at this very moment.
        self._readings = [Reading(self, Findings(), -math.inf) for _ in range(scenario.phases + 1)]
        self._pending: list[list[tuple[float, PeerRecord]]] = [[] for _ in self._readings]

    def publish(self, record: PeerRecord, now_s: float) -> None:
        for pending in self._pending:
            pending.append((now_s, record))

    def next_read_s(self, now_s: float, phase: int) -> float:
        """When the readers of this phase next read."""
        shift_s = DHT.refresh_every_s * phase / self._phases
        return (math.floor((now_s - shift_s) / DHT.refresh_every_s) + 1) * DHT.refresh_every_s + shift_s

    def read(self, now_s: float, phase: int) -> Reading:
        """What readers of this phase know now: they read at a steady pace, and what expires is gone at once."""
        read_at_s = self.next_read_s(now_s, phase) - DHT.refresh_every_s
        reading = self._readings[phase]
        if read_at_s > reading.read_at_s or now_s >= reading.next_expiry_s:
            self._readings[phase] = self._merged(phase, now_s, max(read_at_s, reading.read_at_s))
        return self._readings[phase]

    def read_anew(self, now_s: float) -> Reading:
        """What one knows who reads now."""
        last = self._phases
        if self._pending[last] or now_s >= self._readings[last].next_expiry_s:
            self._readings[last] = self._merged(last, now_s, now_s)
        return self._readings[last]

    def _merged(self, index: int, now_s: float, read_at_s: float) -> Reading:
        pending = self._pending[index]
        count = next((n for n, (at_s, _) in enumerate(pending) if at_s > read_at_s), len(pending))
        fresh = {record.peer_id: record for _, record in pending[:count]}
        del pending[:count]
        return Reading(self, merge(self._readings[index].findings, Findings(peers=fresh), now_s), read_at_s)


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
        machines = [self._make_machine() for _ in range(scenario.peers)]
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

    def _make_machine(self) -> Machine:
        rng, scenario = self.rng, self.scenario
        low, high = math.log(scenario.least_blocks), math.log(scenario.most_blocks + 1)
        line = scenario.line_mib_per_s * math.exp(rng.gauss(0, scenario.line_spread))
        return Machine(
            num_blocks=min(int(math.exp(rng.uniform(low, high))), scenario.most_blocks),
            blocks_per_s=scenario.speed_blocks_per_s * math.exp(rng.gauss(0, scenario.speed_spread)),
            load_block_s=scenario.block_mib / line,
            x_ms=rng.uniform(0, scenario.world_ms),
            y_ms=rng.uniform(0, scenario.world_ms),
        )

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
