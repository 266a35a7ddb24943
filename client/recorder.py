"""Collects what becomes of one session's steps, hop by hop, for its trace. Pure: no sockets."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from client.chain import Link
from client.stats import SessionStats
from client.trace import NOTHING, Event, Place, Spent, Trace, TracedHop
from protocol.messages import HopTrace

MAX_EVENTS = 256  # the last ones are kept
DETAILS = re.compile(r"; last error: [^()]*|ipv[46]:[^\s;,()]+")  # gRPC's, which name peers' addresses


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
