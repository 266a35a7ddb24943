"""A stateless batch over several chains at once: which chains, and how many rows for each. Pure.

Rows of a batch do not depend on each other. Where blocks have several replicas, a chain at a time would leave all but
one of them idle.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from client.chain import Link, choose_chain
from client.costs import block_times_ms
from client.rules import Rules
from client.times import Times
from dht.record import PeerRecord
from protocol.span import Span

MAX_PARTS = 8
MIN_PART_TOKENS = 16  # fewer take as long as one: the weights are read from memory all the same

Chain = tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Portion:
    """The rows `[start, stop)` of a batch, and the chain that they take."""

    start: int
    stop: int
    chain: Chain


def plan(
    peers: Collection[PeerRecord],
    wanted: Span,
    rows: int,
    tokens: int,
    *,
    times: Times,
    avoid: Collection[str] = (),
    rules: Rules | None = None,
    cuts: Collection[int] | None = None,
    rng: random.Random | None = None,
) -> tuple[Portion, ...]:
    """Portions of a batch of `rows` x `tokens` that run at the same time, in the order of their rows.

    Parts of the batch are given out one after the other, each to the chain that would be through with it first, after
    what the parts before it have put on the peers. So chains may share a peer that has time for both. One portion, if
    the blocks have no replicas or the batch is too small.

    Raises:
        BlocksMissing: as `choose_chain`.
    """
    parts = max(1, min(rows, MAX_PARTS, rows * tokens // MIN_PART_TOKENS))
    part_tokens = -(-rows // parts) * tokens
    known = list(peers)
    times_ms = dict(zip((p.peer_id for p in known), block_times_ms(known, times, part_tokens), strict=True))
    seed = (rng or random.Random()).random()  # all parts see the same chance: it does not lead them apart
    busy_ms: defaultdict[str, float] = defaultdict(float)
    chains: dict[Chain, None] = {}  # in the order found
    for _ in range(parts):
        chain = choose_chain(
            known,
            wanted,
            times=times,
            avoid=avoid,
            rules=rules,
            cuts=cuts,
            tokens=part_tokens,
            busy_ms=busy_ms,
            rng=random.Random(seed),
        )
        chains[chain] = None
        for link in chain:
            busy_ms[link.peer.peer_id] += times_ms[link.peer.peer_id] * len(link.span)
    return _portions(list(chains), rows, times_ms)


def _portions(chains: Sequence[Chain], rows: int, times_ms: dict[str, float]) -> tuple[Portion, ...]:
    """Rows for each chain. A peer that several chains use works for each of them a part of its time."""
    users = Counter(peer_id for chain in chains for peer_id in {link.peer.peer_id for link in chain})
    costs_ms = [
        sum(times_ms[link.peer.peer_id] * len(link.span) * users[link.peer.peer_id] for link in chain)
        for chain in chains
    ]
    portions: list[Portion] = []
    start = 0
    for chain, count in zip(chains, split_rows(rows, costs_ms), strict=True):
        if count:
            portions.append(Portion(start, start + count, chain))
            start += count
    return tuple(portions)


def split_rows(rows: int, costs_ms: Sequence[float]) -> tuple[int, ...]:
    """How many of the rows each chain gets, so that the last one is through as early as can be.

    Args:
        costs_ms: milliseconds of a row, for each chain.
    """
    counts = [0] * len(costs_ms)
    next_done_ms = [(cost_ms, i) for i, cost_ms in enumerate(costs_ms)]
    heapq.heapify(next_done_ms)
    for _ in range(rows):
        done_ms, i = next_done_ms[0]
        counts[i] += 1
        heapq.heapreplace(next_done_ms, (done_ms + costs_ms[i], i))
    return tuple(counts)
