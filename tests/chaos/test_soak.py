"""Peers join and leave at random under four clients, for long: no wrong answer, none lost, memory flat.

    SOAK_MINUTES=15   how long
    SOAK_SEED=17      repeats what peers did (not when it met which answer)

The clients are processes of their own, as people's are: sampling has its seed to itself, each has its own view of the
swarm, and memory is told apart. Three peers stay, so that there always is a chain, and that memory can be watched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from client.config import ClientConfig
from client.swarm import Swarm
from tests.chaos.arena import LEAVE_S
from tests.chaos.cases import CODECS, MODES, Examiner
from tests.chaos.faults import THIRDS
from tests.e2e.support import sessions_by_peer
from tests.processes import LocalSwarm, PeerProcess, Process, at_home, swarm, until

SEED = int(os.environ.get("SOAK_SEED", secrets.randbits(32)))
MINUTES = float(os.environ.get("SOAK_MINUTES", "15"))
CLIENTS = 4
GUESTS_PER_THIRD = 2  # at most, besides the one that stays
PAUSE_S = (1.0, 5.0)  # between two comings or goings
IDLE_LEAVES = 0.25  # chance that one leaves though nobody is in use at this moment
SAMPLE_EVERY_S = 2.0
LAST_ANSWER_S = 120.0
MIB = 1 << 20


def growth(samples: Sequence[float]) -> tuple[float, float]:
    """By how much the last third's median is above the first third's, and how much is allowed.

    The first fifth does not count: caches fill, allocators learn.
    """
    settled = samples[len(samples) // 5 :]
    third = max(1, len(settled) // 3)
    before, after = statistics.median(settled[:third]), statistics.median(settled[-third:])
    return after - before, max(16 * MIB, 0.05 * before)


def test_growth_sees_a_leak_and_no_wobble() -> None:
    rng = random.Random(3)
    flat = [400 * MIB + rng.uniform(-10, 10) * MIB for _ in range(450)]
    warm_up = [value - 100 * MIB if i < 80 else value for i, value in enumerate(flat)]
    leak = [value + i * 0.1 * MIB for i, value in enumerate(flat)]
    for samples in (flat, warm_up):
        grown, allowed = growth(samples)
        assert grown <= allowed
    grown, allowed = growth(leak)
    assert grown > allowed


@dataclass(eq=False)
class Client:
    """A `soak_client`."""

    process: Process

    def answers(self) -> list[dict[str, Any]]:
        whole = self.process.stdout.rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]


@dataclass(eq=False)
class Churn:
    """Peers that come and go."""

    rng: random.Random
    swarm: LocalSwarm
    guests: list[tuple[str, PeerProcess]] = field(default_factory=list)
    leaving: list[PeerProcess] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def turn(self, sessions: Mapping[str, int]) -> None:
        """One peer comes or goes: mostly one that is needed at this moment.

        Args:
            sessions: of each peer, by its id.
        """
        self._look()
        serving = [guest for guest in self.guests if hasattr(guest[1], "peer_id")]
        room = [third for third in THIRDS for _ in range(GUESTS_PER_THIRD - self._count(third))]
        if room and self.rng.random() >= len(serving) / (GUESTS_PER_THIRD * len(THIRDS)):
            third = self.rng.choice(room)
            self.guests.append((third, self.swarm.start(third)))
            self.happened["start"] += 1
        elif serving:
            in_use = [guest for guest in serving if sessions.get(guest[1].peer_id)]
            if in_use or self.rng.random() < IDLE_LEAVES:
                self.happened["in use"] += bool(in_use)
                self._leaves(self.rng.choice(in_use or serving))

    def _count(self, third: str) -> int:
        return sum(1 for of, _ in self.guests if of == third)

    def _leaves(self, guest: tuple[str, PeerProcess]) -> None:
        self.guests.remove(guest)
        if self.rng.random() < 0.5:
            guest[1].kill()
            self.happened["SIGKILL"] += 1
        else:
            guest[1].send(signal.SIGTERM)
            self.leaving.append(guest[1])
            self.happened["SIGTERM"] += 1

    def _look(self) -> None:
        """Has anybody ended who should not have, or otherwise than it should?"""
        for third, peer in list(self.guests):
            if not peer.is_alive:
                self.guests.remove((third, peer))
                self.complaints.append(f"a peer of {third} ended by itself: {peer.stderr[-2000:]}")
            elif serves(peer):
                peer.ready()
        for peer in [peer for peer in self.leaving if not peer.is_alive]:
            self._check_left(peer)

    def _check_left(self, peer: PeerProcess) -> None:
        self.leaving.remove(peer)
        code = peer.wait(LEAVE_S)
        if code != 0:
            self.complaints.append(f"a peer left with exit code {code}: {peer.stderr[-2000:]}")

    def end(self) -> None:
        """Waits for those that leave."""
        for peer in list(self.leaving):
            self._check_left(peer)
        self._look()


def serves(peer: PeerProcess) -> bool:
    """Has it said its two lines?"""
    return peer.stdout.count("\n") >= 2


@dataclass(eq=False)
class Memory:
    """Resident memory of processes, sampled."""

    watched: Mapping[str, psutil.Process]
    samples: dict[str, list[float]] = field(default_factory=dict)

    def sample(self) -> None:
        for name, process in self.watched.items():
            self.samples.setdefault(name, []).append(process.memory_info().rss)

    def report(self) -> tuple[str, list[str]]:
        """A table, and who grew."""
        lines, grew = [], []
        for name, samples in self.samples.items():
            grown, allowed = growth(samples)
            lines.append(f"{name:<18} {samples[-1] / MIB:7.0f} MiB, grew by {grown / MIB:6.1f} of {allowed / MIB:5.1f}")
            if grown > allowed:
                grew.append(f"{name} grew by {grown / MIB:.1f} MiB, allowed are {allowed / MIB:.1f}")
        return "\n".join(lines), grew


@contextlib.contextmanager
def clients(home: Path, join: Sequence[str]) -> Iterator[list[Client]]:
    """Clients that ask from now on; killed at the end, if they have not ended."""
    examiner, rng = Examiner(), random.Random(SEED)
    cases = [examiner.draw(rng, mode, codec).to_json() for mode, codec in itertools.product(MODES, CODECS)]
    file = home / "cases.json"
    file.write_text(json.dumps(cases))
    with contextlib.ExitStack() as stack:
        yield [
            Client(
                stack.enter_context(
                    Process(home, "tests.chaos.soak_client", str(file), *join, has_input=True, anew=True)
                )
            )
            for _ in range(CLIENTS)
        ]


@pytest.mark.slow
def test_peers_come_and_go_under_four_clients(tmp_path: Path) -> None:
    print(f"\nSOAK_SEED={SEED}, {MINUTES:g} minutes")
    rng = random.Random(SEED)
    with (
        at_home(tmp_path),
        swarm(tmp_path, None, THIRDS, anew=True) as peers,
        Swarm.connect(ClientConfig(join=peers.join)) as onlooker,
        clients(tmp_path, peers.join) as asking,
    ):
        stay = {f"peer of {peer.blocks}": psutil.Process(peer.pid) for peer in peers.peers}
        churn = Churn(rng, peers)
        for client in asking:
            until(client.answers, "a client's first answer")
        memory = Memory(stay | {f"client {i}": psutil.Process(c.process.pid) for i, c in enumerate(asking)})
        began_s = time.monotonic()
        next_turn_s = began_s
        while time.monotonic() - began_s < MINUTES * 60:
            if time.monotonic() >= next_turn_s:
                churn.turn(sessions_by_peer(onlooker))
                next_turn_s = time.monotonic() + rng.uniform(*PAUSE_S)
            memory.sample()
            assert all(client.process.is_alive for client in asking), [client.process.stderr for client in asking]
            time.sleep(SAMPLE_EVERY_S)
        for client in asking:
            client.process.end_input()
        codes = [client.process.wait(LAST_ANSWER_S) for client in asking]
        churn.end()
        answers = [client.answers() for client in asking]
    told, grew = memory.report()
    print(summary(answers), dict(churn.happened), told, sep="\n")
    wrong = [answer for one in answers for answer in one if answer["trouble"]]
    assert not (wrong or grew or churn.complaints), f"SOAK_SEED={SEED}"
    assert codes == [0] * CLIENTS
    assert all(churn.happened[what] for what in ("start", "SIGKILL", "SIGTERM"))
    assert reroutes(answers) >= MINUTES, "answers were hardly disturbed"


def reroutes(answers: Sequence[Sequence[Mapping[str, Any]]]) -> int:
    """How often an answer went on through other peers."""
    return sum(answer["reroutes"] for one in answers for answer in one)


def summary(answers: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """In a few lines."""
    every = [answer for one in answers for answer in one]
    bad = sum(1 for answer in every if answer["trouble"])
    seconds = sorted(answer["s"] for answer in every)
    return (
        f"{len(every)} answers ({', '.join(str(len(one)) for one in answers)}), {bad} wrong or lost, "
        f"{reroutes(answers)} reroutes; seconds per answer: "
        f"median {statistics.median(seconds):.2f}, 99 of 100 {seconds[int(0.99 * len(seconds))]:.2f}, "
        f"longest {seconds[-1]:.2f}"
    )
