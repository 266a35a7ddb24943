"""The peers of one simulated model, and what the DHT holds of them: read at a pace, merged and expiring as in `dht`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Final

from benchmarks.swarm_meter import Meter
from benchmarks.swarm_scenario import Machine, Scenario
from dht.config import DhtConfig
from dht.record import PeerRecord
from dht.view import Findings, SwarmView, make_view, merge
from peer.placement import Placed, could_help, placed

DHT: Final = DhtConfig()


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
