"""What became of a session's steps, hop by hop, and how its chain changed meanwhile. Pure: no sockets.

`Recorder` is told of each step and each change; `trace_of` is what it knows at one moment.

A peer says how long a step waited there and how long it was computed. What is left of the step's time was spent between
them: on the network, and on bytes. It is measured as one sum, and divided among the ways from hop to hop as their known
round trips go.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from client.chain import Link
from client.stats import SessionStats
from protocol.mean import smoothed
from protocol.messages import HopTrace
from protocol.span import Span

if TYPE_CHECKING:
    from client.session import Session

MAX_EVENTS = 256  # the last ones are kept
DETAILS = re.compile(r"; last error: [^()]*|ipv[46]:[^\s;,()]+")  # gRPC's, which name peers' addresses

Place = tuple[str, Span]  # a peer id, and the blocks that it runs


@dataclass(frozen=True, slots=True)
class Spent:
    """Where milliseconds went at one hop: waiting there, being computed, and on the way to it. The first two are the
    peer's own word."""

    queue_ms: float = 0.0
    compute_ms: float = 0.0
    network_ms: float = 0.0

    @property
    def ms(self) -> float:
        """All of them."""
        return self.queue_ms + self.compute_ms + self.network_ms

    def plus(self, other: Spent) -> Spent:
        """The sum of both."""
        return Spent(
            self.queue_ms + other.queue_ms, self.compute_ms + other.compute_ms, self.network_ms + other.network_ms
        )

    def minus(self, other: Spent) -> Spent:
        """What `other`, an earlier sum, has not."""
        return Spent(
            max(0.0, self.queue_ms - other.queue_ms),
            max(0.0, self.compute_ms - other.compute_ms),
            max(0.0, self.network_ms - other.network_ms),
        )

    def smoothed(self, measured: Spent) -> Spent:
        """The running mean after one more measurement."""
        return Spent(
            smoothed(self.queue_ms, measured.queue_ms),
            smoothed(self.compute_ms, measured.compute_ms),
            smoothed(self.network_ms, measured.network_ms),
        )

    def as_json(self) -> dict[str, float]:
        """To the microsecond."""
        return {
            "queue_ms": round(self.queue_ms, 3),
            "compute_ms": round(self.compute_ms, 3),
            "network_ms": round(self.network_ms, 3),
        }


NOTHING = Spent()


@dataclass(frozen=True, slots=True)
class TracedHop:
    """One peer's part in a session.

    Attributes:
        name: the public name that the peer chose, or the end of its id.
        answers: it belongs to the chain now.
        relayed: its outputs go through this client, since it cannot push them to the next peer.
        steps: that went through it and came out of the chain.
        timed: of these, the ones that were alone on their way and undisturbed: only their time on the network is known.
        spent: in all steps. Its part of the network is a share of what was left; the last hop's has the way back in it.
        lately: a running mean over the last timed steps; None: there was none yet.
        began_s, ended_s: when its first and its last step came out, in seconds since the session began.
    """

    peer_id: str
    name: str
    blocks: Span
    answers: bool = False
    relayed: bool = False
    steps: int = 0
    timed: int = 0
    spent: Spent = NOTHING
    lately: Spent | None = None
    began_s: float = 0.0
    ended_s: float = 0.0

    @property
    def place(self) -> Place:
        """What tells it from the others."""
        return self.peer_id, self.blocks

    def since(self, before: TracedHop | None, at_s: float) -> TracedHop:
        """What it did after `before`, which was noted at `at_s`; that becomes the new 0."""
        before = before or TracedHop(self.peer_id, self.name, self.blocks)
        return replace(
            self,
            steps=self.steps - before.steps,
            timed=self.timed - before.timed,
            spent=self.spent.minus(before.spent),
            began_s=max(0.0, self.began_s - at_s),
            ended_s=max(0.0, self.ended_s - at_s),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """The chain changed, or waits: when, in seconds since the session began, and why, as a sentence."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of a session's steps so far.

    Attributes:
        hops: in the order of their blocks; those that answer no more after them.
        n_blocks: of the model.
        began_at: seconds since 1970.
        at_s: when this was noted, in seconds since the session began.
        steps, tokens: that went through the chain; a step may carry several tokens.
        total_s: in steps, from the first byte sent to the last one received, recoveries and waiting for peers included.
        reroutes: hops that were replaced.
        events: what changed.
    """

    hops: tuple[TracedHop, ...]
    n_blocks: int
    began_at: float
    at_s: float
    steps: int
    tokens: int
    total_s: float
    reroutes: int
    events: tuple[Event, ...]

    @property
    def chain(self) -> tuple[TracedHop, ...]:
        """The hops that answer, in order; with gaps while others are looked for."""
        return tuple(hop for hop in self.hops if hop.answers)

    def since(self, earlier: Trace) -> Trace:
        """What was added after an earlier trace, as one answer of a conversation; all, if that was of another one."""
        if earlier.began_at != self.began_at:
            return self
        before = {hop.place: hop for hop in earlier.hops}
        hops = (hop.since(before.get(hop.place), earlier.at_s) for hop in self.hops)
        return replace(
            self,
            hops=tuple(hop for hop in hops if hop.steps or hop.answers),
            began_at=self.began_at + earlier.at_s,
            at_s=self.at_s - earlier.at_s,
            steps=self.steps - earlier.steps,
            tokens=self.tokens - earlier.tokens,
            total_s=self.total_s - earlier.total_s,
            reroutes=self.reroutes - earlier.reroutes,
            events=tuple(Event(e.at_s - earlier.at_s, e.text) for e in self.events if e.at_s > earlier.at_s),
        )

    def as_json(self) -> dict[str, Any]:
        """For watching: the chain that answers, how often it changed, and why."""
        return {
            "n_blocks": self.n_blocks,
            "chain": [
                {
                    "peer_id": hop.peer_id,
                    "name": hop.name,
                    "blocks": str(hop.blocks),
                    "relayed": hop.relayed,
                    "ms": None if hop.lately is None else round(hop.lately.ms, 3),
                    **({} if hop.lately is None else hop.lately.as_json()),
                }
                for hop in self.chain
            ],
            "steps": self.steps,
            "reroutes": self.reroutes,
            "events": [event.text for event in self.events],
        }

    def as_report(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {
            "began_at": self.began_at,
            "n_blocks": self.n_blocks,
            "steps": self.steps,
            "tokens": self.tokens,
            "total_s": round(self.total_s, 4),
            "reroutes": self.reroutes,
            "hops": [
                {
                    "peer_id": hop.peer_id,
                    "name": hop.name,
                    "blocks": str(hop.blocks),
                    "answers": hop.answers,
                    "relayed": hop.relayed,
                    "steps": hop.steps,
                    "timed_steps": hop.timed,
                    **hop.spent.as_json(),
                }
                for hop in self.hops
            ],
            "events": [{"at_s": round(event.at_s, 3), "text": event.text} for event in self.events],
        }


def trace_of(session: Session) -> Trace:
    """What became of the session's steps so far. From any thread."""
    return session.record.trace()


class Recorder:
    """Collects what happens to one session. For any thread.

    Args:
        n_blocks: of the model.
        stats: the session's own counts.
        clock: seconds, monotonic.
        now: seconds since 1970.
    """

    def __init__(
        self,
        n_blocks: int,
        stats: SessionStats,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._n_blocks = n_blocks
        self._stats = stats
        self._clock = clock
        self._began_s = clock()
        self._began_at = now()
        self._hops: dict[Place, TracedHop] = {}
        self._shares: dict[Place, float] = {}  # of what is left of a step, by the hops that answer
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._lock = threading.Lock()

    def chain(self, links: Sequence[Link], ways_ms: Sequence[float], relayed: Sequence[bool]) -> None:
        """These hops answer from now on.

        Args:
            ways_ms: what is known of the ways: to each of the hops from the one before, and back from the last one.
            relayed: do the hop's outputs go through this client?
        """
        ways = [*ways_ms[: len(links)]]
        if links:
            ways[-1] += sum(ways_ms[len(links) :])
        with self._lock:
            self._hops = {place: replace(hop, answers=False) for place, hop in self._hops.items()}
            self._shares = {}
            for link, way_ms, is_relayed in zip(links, ways, relayed, strict=True):
                place = (link.peer.peer_id, link.span)
                known = self._hops.get(place) or TracedHop(link.peer.peer_id, _name(link), link.span)
                self._hops[place] = replace(known, answers=True, relayed=is_relayed)
                self._shares[place] = way_ms / sum(ways) if sum(ways) > 0 else 1 / len(ways)

    def step(self, links: Sequence[Link], costs: Iterable[HopTrace], took_s: float, *, is_timed: bool) -> None:
        """A step came out of the chain.

        Args:
            costs: what the hops said of it.
            took_s: since it was sent. No hop can have had it for longer, whatever it says.
            is_timed: was it alone on its way, and undisturbed?
        """
        took_ms, at_s = took_s * 1e3, self._clock() - self._began_s
        said = {cost.start: Spent(min(cost.queue_ms, took_ms), min(cost.compute_ms, took_ms)) for cost in costs}
        parts = {(link.peer.peer_id, link.span): said.get(link.span.start, NOTHING) for link in links}
        left_ms = max(0.0, took_ms - sum(part.ms for part in parts.values())) if is_timed else 0.0
        with self._lock:
            for place in parts.keys() & self._hops.keys():  # others have just left the chain
                hop = self._hops[place]
                part = replace(parts[place], network_ms=left_ms * self._shares.get(place, 0.0))
                lately = part if hop.lately is None else hop.lately.smoothed(part)
                self._hops[place] = replace(
                    hop,
                    steps=hop.steps + 1,
                    timed=hop.timed + is_timed,
                    spent=hop.spent.plus(part),
                    lately=lately if is_timed else hop.lately,
                    began_s=hop.began_s if hop.steps else at_s,
                    ended_s=at_s,
                )

    def event(self, text: str) -> None:
        """The chain changed, or waits. Traces travel further than logs, so no peer's address is kept."""
        with self._lock:
            self._events.append(Event(self._clock() - self._began_s, DETAILS.sub("", text)))

    def trace(self) -> Trace:
        """What is known now."""
        with self._lock:
            hops = sorted(self._hops.values(), key=lambda hop: (not hop.answers, hop.blocks, hop.began_s))
            events = tuple(self._events)
        return Trace(
            hops=tuple(hops),
            n_blocks=self._n_blocks,
            began_at=self._began_at,
            at_s=self._clock() - self._began_s,
            steps=self._stats.steps,
            tokens=self._stats.tokens,
            total_s=self._stats.busy_s,
            reroutes=self._stats.reroutes,
            events=events,
        )


def _name(link: Link) -> str:
    return link.peer.public_name or f"…{link.peer.peer_id[-8:]}"
