"""What became of a session's steps, hop by hop, and how its chain changed meanwhile. Pure: no sockets.

`client.recorder` is told of each step and each change; `trace_of` is what it knows at one moment.

A peer says how long a step waited there and how long it was computed. What is left of the step's time was spent between
them: on the network, and on bytes. It is measured as one sum, and divided among the ways from hop to hop as their known
round trips go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from protocol.mean import smoothed
from protocol.span import Span

if TYPE_CHECKING:
    from client.session import Session

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
