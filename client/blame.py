"""Blame: which peers failed this client lately, and between which it has to carry steps itself.

Local, and it decays: a peer is avoided, never banned; an edge is tried again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

Edge = tuple[str, str]
"""Ids of two peers, the first of which pushes to the second."""


LEAST_S = 0.1  # whatever a peer says of when to come back
LIAR_S = 3600.0  # a peer that was found to lie is avoided, whatever else it does


class Blame:
    """Remembers failures for a while.

    Args:
        avoid_s: seconds that a failed peer is avoided, where it did not say itself when to come back, and that an edge
            over which nothing came is not tried again.
        clock: seconds, monotonic.
    """

    def __init__(self, avoid_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._avoid_s = avoid_s
        self._clock = clock
        self._peers: dict[str, float] = {}  # until when
        self._liars: dict[str, float] = {}
        self._edges: dict[Edge, float] = {}

    def add(self, peer_id: str, retry_after_s: float | None = None) -> None:
        """The peer failed, or is full until `retry_after_s` from now."""
        wanted_s = math.inf if retry_after_s is None or math.isnan(retry_after_s) else retry_after_s
        self._peers[peer_id] = self._clock() + min(max(wanted_s, LEAST_S), self._avoid_s)

    def forgive(self, peer_id: str) -> None:
        """The peer does what it is asked again."""
        self._peers.pop(peer_id, None)

    def accuse(self, peer_id: str) -> None:
        """The peer lied; no good deed makes that forgotten."""
        self._liars[peer_id] = self._clock() + LIAR_S

    def add_edge(self, edge: Edge) -> None:
        """What the first peer pushed did not reach the second, though both answer."""
        self._edges[edge] = self._clock() + self._avoid_s

    def avoided(self) -> frozenset[str]:
        """The peers to avoid now."""
        now_s = self._clock()
        self._peers = {peer: until_s for peer, until_s in self._peers.items() if until_s > now_s}
        self._liars = {peer: until_s for peer, until_s in self._liars.items() if until_s > now_s}
        return frozenset(self._peers.keys() | self._liars.keys())

    def cut_edges(self) -> frozenset[Edge]:
        """The edges over which the client carries steps now."""
        now_s = self._clock()
        self._edges = {edge: until_s for edge, until_s in self._edges.items() if until_s > now_s}
        return frozenset(self._edges)
