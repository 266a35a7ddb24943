"""Six real peers of the embedded model, two for each third of its blocks, each behind a proxy; and a client."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.model import SwarmModel, SwarmModelForCausalLM
from client.swarm import Swarm
from dht.ports import bind
from protocol.errors import ConfigError
from tests.chaos.cases import CODECS, MODEL
from tests.chaos.faults import THIRDS, Fault
from tests.e2e.support import answers_at_length
from tests.processes import (
    START_S,
    LocalSwarm,
    PeerProcess,
    at_home,
    nothing_left_over,
    until,
)
from tests.proxy import BLACK_HOLE, PASS, SLOW, SLOW_LORIS, Proxies, Proxy, proxies

_ERROR = re.compile(r"[\w.]*(Error|Exception|ExceptionGroup|Exit|Interrupt)\b")
REPLICAS = 2
LEAVE_S = 30.0  # for a peer to leave after SIGTERM
SEEN_S = 90.0  # a record that nobody renews lives for 60 s
PREFILL_TOKENS = 32  # so that a prompt travels in some chunks

CLIENT: Mapping[str, Any] = {"wait_s": 2 * START_S}
"""How the client is set, but for the codec."""


PORTS = (20_000, 30_000)


@dataclass(eq=False)
class Place:
    """A peer behind its proxy, and the one that comes after it when it is dead."""

    third: str
    proxy: Proxy
    process: PeerProcess
    ending: signal.Signals | None = None
    frozen: bool = False
    waking: threading.Timer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"

    def end(self, number: signal.Signals) -> None:
        """SIGKILL or SIGTERM; does not wait."""
        self.ending = number
        self.process.send(number)

    def freeze(self, *, whole: bool, wakes_s: float | None) -> None:
        """SIGSTOP, to all processes of the peer or to its first one; SIGCONT `wakes_s` later."""
        self.frozen = True
        if whole:
            os.killpg(self.process.pid, signal.SIGSTOP)
        else:
            self.process.send(signal.SIGSTOP)
        if wakes_s is not None:
            self.waking = threading.Timer(wakes_s, self.wake)
            self.waking.daemon = True
            self.waking.start()

    def wake(self) -> None:
        """A frozen peer goes on; another one is left as it is."""
        if self.waking is not None:
            self.waking.cancel()
            self.waking = None
        if self.frozen:
            self.frozen = False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGCONT)


@dataclass(eq=False)
class Arena:
    """The swarm and its client. Made by `arena`.

    Attributes:
        clients: by codec.
        events: what the clients said since `calm`.
    """

    swarm: LocalSwarm
    proxies: Proxies
    places: list[Place] = field(default_factory=list)
    clients: dict[str, SwarmModel] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def start(self, third: str) -> Place:
        """Another peer. Does not wait for it."""
        port = _free_port()
        proxy = self.proxies.before(port)
        place = Place(third, proxy, self._start(third, proxy, port))
        self.places.append(place)
        return place

    def _start(self, third: str, proxy: Proxy, port: int) -> PeerProcess:
        return self.swarm.start(third, "--port", str(port), "--announce-port", str(proxy.port))

    def of(self, third: str) -> list[Place]:
        return [place for place in self.places if place.third == third]

    def in_use(self, model: SwarmModel) -> dict[str, Place]:
        """The peers of the chain that answered last, by third."""
        by_id = {place.process.peer_id: place for place in self.places if hasattr(place.process, "peer_id")}
        found = [by_id[link.peer.peer_id] for link in model.chain if link.peer.peer_id in by_id]
        return {place.third: place for place in found}

    # ------------------------------------------------------------------ strikes

    def strike(self, fault: Fault, place: Place, upstream: Sequence[Place]) -> None:
        """Does what the fault says to the peer in `place`; to a link, to that from the peers `upstream`."""
        match fault.kind:
            case "kill -9":
                place.end(signal.SIGKILL)
            case "SIGTERM":
                place.end(signal.SIGTERM)
            case "freeze":
                place.freeze(whole=fault.whole, wakes_s=fault.wakes_s)
            case "black hole":
                place.proxy.set(BLACK_HOLE)
            case "black link":
                place.proxy.set(BLACK_HOLE, [peer.process.pid for peer in upstream])
            case "slow":
                place.proxy.set(SLOW)
            case "slow loris":
                place.proxy.set(SLOW_LORIS)

    def mend(self, *, kill_frozen: bool = False) -> list[str]:
        """All links pass, all frozen peers go on or die, and who has to end has ended.

        Returns:
            what went wrong with peers, other than what was done to them.
        """
        complaints = []
        for place in self.places:
            if kill_frozen and place.frozen:
                place.end(signal.SIGKILL)
            place.wake()
            place.proxy.set(PASS)
        for place in self.places:
            if place.process.is_alive and place.ending is None:
                continue
            code = place.process.wait(LEAVE_S)
            if place.ending is None or (place.ending is signal.SIGTERM and code != 0):
                complaints.append(f"the peer of {place.third} ended with {code}: {place.process.stderr[-2000:]}")
            place.ending = place.ending or signal.SIGKILL
            self.swarm.peers.remove(place.process)
        return complaints

    def settle(self) -> None:
        """In the place of each peer that has ended comes another. Returns when the client sees all."""
        for place in self.places:
            if not place.process.is_alive:
                assert place.ending is not None, f"the peer of {place.third} ended by itself: {place.process.stderr}"
                place.proxy.upstream_port = _free_port()
                place.process, place.ending = self._start(place.third, place.proxy, place.proxy.upstream_port), None
        for place in self.places:
            place.process.ready()
        self.until_seen()

    def until_seen(self) -> None:
        """Until the client sees exactly the peers that live, where they are."""
        wanted = {(place.process.peer_id, place.address) for place in self.places}
        swarm = self.client.swarm

        def seen() -> bool:
            view = swarm.refresh()
            records = [peer for model in view.models for peer in view.online(model.fingerprint)]
            return {(peer.peer_id, peer.addresses[0]) for peer in records if peer.addresses} == wanted

        until(seen, "the client to see all peers, and no others", SEEN_S)

    def tracebacks(self) -> Counter[str]:
        """What peers wrote of errors that they did not expect, by its last line."""
        found: Counter[str] = Counter()
        for log in sorted((self.swarm.home / "logs").glob("*.err")):
            for text in log.read_text(errors="replace").split("Traceback (most recent call last):")[1:]:
                ends = [line for line in text.splitlines() if _ERROR.match(line.lstrip(" |"))]
                found[ends[0].strip(" |") if ends else "?"] += 1
        return found

    @property
    def client(self) -> SwarmModel:
        return next(iter(self.clients.values()))


@contextlib.contextmanager
def arena(home: Path) -> Iterator[Arena]:
    """The arena, ready. On exit nothing of it runs any more."""
    with at_home(home), nothing_left_over(home), proxies() as place, contextlib.ExitStack() as stack:
        local = LocalSwarm(home, ("--model", MODEL))
        stack.callback(_end, local)
        made = Arena(local, place)
        made.start(THIRDS[0]).process.ready()
        for third in [third for third in THIRDS for _ in range(REPLICAS)][1:]:
            made.start(third)
        for place_ in made.places:
            place_.process.ready()
        joined: Swarm | None = None
        for codec in CODECS:
            model = SwarmModelForCausalLM.from_pretrained(
                MODEL,
                join=local.join,
                swarm=joined,
                codec=codec,
                prefill_tokens=PREFILL_TOKENS,
                on_event=made.events.append,
                **CLIENT,
            )
            if joined is None:
                joined = model.swarm
                stack.enter_context(model)
            answers_at_length(model)
            made.clients[codec] = model
        made.until_seen()
        yield made


def _end(swarm: LocalSwarm) -> None:
    for peer in swarm.peers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(peer.pid, signal.SIGCONT)  # a stopped p2pd would not notice that its peer has gone
    swarm.kill()


def _free_port() -> int:
    """A port that nobody listens at. Not one of those that the system gives to connections: one of these may be gone by
    the time that a peer has started."""
    while True:
        port = random.randrange(*PORTS)
        try:
            return bind("127.0.0.1", port)
        except ConfigError:
            continue
