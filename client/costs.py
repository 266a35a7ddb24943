"""What a chain's parts are expected to take, in milliseconds of one step, as arrays. Pure: no sockets, no clock.

A chain of hops costs, for each hop, the way to its peer, a fixed cost for protocol and codec, the peer's queue, and its
time per block for each block that the chain uses; and in the end the way back.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from client.rules import Rules
from client.times import Times
from dht.record import PeerRecord
from protocol.span import Span

HOP_MS = 1.0  # protocol and codec of one hop, beside its round trip
PRIOR_BLOCK_MS = 1.0  # of a token, where no peer's time is known
PRIOR_RTT_MS = 20.0  # where no round trip is known
FULLNESS = 0.2  # a peer whose KV budget is used up counts as so much slower: the emptier of equals is taken
CHANCE = 0.1  # and each one as up to so much slower, at random: clients spread over the nearly best
LAST_RESORT_MS = 1e9  # worse than any detour, and better than nothing
CONSIDERED = 64  # peers for each block: the best on their own; more would only take longer

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Places:
    """Between which peers a chain, or a lost part of it, runs; None: the client.

    Attributes:
        relayed: pairs of peers that do not reach each other; the client carries what goes between them.
    """

    previous: str | None = None
    following: str | None = None
    relayed: Collection[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Costs:
    """The costs of n peers for B blocks.

    Attributes:
        peers: the n peers that the arrays speak of.
        block_ms: [n, B], infinite where the peer does not serve the block.
        first_ms: [n], to begin with the peer: the way to it, its queue and the fixed cost.
        switch_ms: [n, n], the same for going on from the peer of the row to that of the column.
        last_ms: [n], the way from the peer to what follows the last block.
    """

    peers: tuple[PeerRecord, ...]
    block_ms: Floats
    first_ms: Floats
    switch_ms: Floats
    last_ms: Floats


def estimate(
    usable: Sequence[tuple[PeerRecord, Span]],
    wanted: Span,
    *,
    times: Times,
    avoid: Collection[str],
    rules: Rules,
    places: Places,
    published: Iterable[PeerRecord],
    kv_tokens: int,
    tokens: int,
    busy_ms: Mapping[str, float],
    rng: random.Random,
) -> Costs:
    """The costs of peers, each with the part of its span that can be used.

    Args:
        published: records to read round-trip times off, of the neighbours of a lost part too.
        tokens: rows x tokens of the step; 1: a decode step.
        busy_ms: what peers will be busy with beside their queues.
    """
    peers = [peer for peer, _ in usable]
    resorts_ms = LAST_RESORT_MS * np.array([_resorts(peer, times, avoid, kv_tokens) for peer in peers])
    weight = np.array([_weight(peer, times) * (1.0 + CHANCE * rng.random()) for peer in peers])
    enter_ms = HOP_MS + np.array([_queue_ms(peer, times) + busy_ms.get(peer.peer_id, 0.0) for peer in peers])
    block_ms = np.full((len(peers), len(wanted)), np.inf)
    for row, (_, span), ms in zip(block_ms, usable, block_times_ms(peers, times, tokens), strict=True):
        row[span.start - wanted.start : span.stop - wanted.start] = ms
    block_ms *= weight[:, None]
    preferred = np.array([rules.prefers(peer) for peer in peers]) & (resorts_ms == 0)
    pinned = np.isfinite(block_ms[preferred]).any(axis=0)
    block_ms[np.ix_(~preferred, pinned)] += LAST_RESORT_MS

    alone_ms = enter_ms + resorts_ms + _from_here_ms([peer.peer_id for peer in peers], times)
    kept = _thinned(block_ms, alone_ms)
    block_ms, weight, enter_ms, resorts_ms = block_ms[kept], weight[kept], enter_ms[kept], resorts_ms[kept]
    peers = [peers[i] for i in kept]
    ids: list[str | None] = [peer.peer_id for peer in peers]
    nodes = list(dict.fromkeys([*ids, places.previous, places.following]))
    ways_ms = _one_way_ms(nodes, times, places.relayed, published)
    n = len(peers)
    return Costs(
        peers=tuple(peers),
        block_ms=block_ms,
        first_ms=weight * (ways_ms[nodes.index(places.previous), :n] + enter_ms) + resorts_ms,
        switch_ms=weight * (ways_ms[:n, :n] + enter_ms) + resorts_ms,
        last_ms=weight * ways_ms[:n, nodes.index(places.following)],
    )


def _resorts(peer: PeerRecord, times: Times, avoid: Collection[str], kv_tokens: int) -> int:
    """How many reasons there are to use the peer only where nobody else serves."""
    return (peer.peer_id in avoid) + (_kv_tokens_left(peer, times) < kv_tokens)


def _weight(peer: PeerRecord, times: Times) -> float:
    used = 1.0 - _kv_tokens_left(peer, times) / peer.kv_tokens_total if peer.kv_tokens_total else 1.0
    return 1.0 + FULLNESS * min(1.0, max(0.0, used))


def _kv_tokens_left(peer: PeerRecord, times: Times) -> int:
    live = times.of(peer.peer_id).kv_tokens_left
    return peer.kv_tokens_left if live is None else live


def _queue_ms(peer: PeerRecord, times: Times) -> float:
    live = times.of(peer.peer_id).queue_ms
    return (peer.queue_ms or 0.0) if live is None else live


def block_times_ms(peers: Sequence[PeerRecord], times: Times, tokens: int) -> list[float]:
    """Each peer's time for one block and all the tokens; where nobody knows it, as the others' in the median."""
    known = [_known_block_ms(peer, times, tokens) for peer in peers]
    measured = [ms for ms in known if ms is not None]
    prior_ms = median(measured) if measured else PRIOR_BLOCK_MS * tokens
    return [prior_ms if ms is None else ms for ms in known]


def _known_block_ms(peer: PeerRecord, times: Times, tokens: int) -> float | None:
    """As this client has seen it lately, else as the record says."""
    live = times.of(peer.peer_id)
    if tokens > 1 and live.token_ms is not None:
        return tokens * live.token_ms
    if tokens > 1 and peer.tokens_per_s:
        return tokens * 1e3 / peer.tokens_per_s / len(peer.span)
    if live.block_ms is not None:
        return tokens * live.block_ms
    return None if peer.step_ms is None else tokens * peer.step_ms / len(peer.span)


def _thinned(block_ms: Floats, enter_ms: Floats) -> NDArray[np.intp]:
    """The peers to consider, in order: of each block the `CONSIDERED` that cost least per block on their own."""
    if len(block_ms) <= CONSIDERED:
        return np.arange(len(block_ms))
    served = np.isfinite(block_ms)
    alone_ms = (np.where(served, block_ms, 0.0).sum(axis=1) + enter_ms) / served.sum(axis=1)
    ranked = np.argsort(alone_ms, kind="stable")
    kept = [ranked[served[ranked, block]][:CONSIDERED] for block in range(served.shape[1])]
    return np.unique(np.concatenate(kept))


def ways_ms(peers: Sequence[PeerRecord], times: Times, relayed: Collection[tuple[str, str]] = ()) -> tuple[float, ...]:
    """What the ways along a chain of these peers should take: to each from the one before, and back from the last."""
    stops: list[str | None] = [None, *(peer.peer_id for peer in peers), None]
    nodes = list(dict.fromkeys(stops))
    ways = _one_way_ms(nodes, times, relayed, peers)
    return tuple(HOP_MS + float(ways[nodes.index(a), nodes.index(b)]) for a, b in itertools.pairwise(stops))


def _from_here_ms(nodes: Sequence[str | None], times: Times) -> Floats:
    """[n]: the round trip from the client to each peer; to the client itself (None), 0."""
    prior_ms = median(times.rtts_ms.values() or [PRIOR_RTT_MS])
    return np.array([0.0 if node is None else times.rtts_ms.get(node, prior_ms) for node in nodes])


def _one_way_ms(
    nodes: Sequence[str | None],
    times: Times,
    relayed: Collection[tuple[str, str]],
    published: Iterable[PeerRecord],
) -> Floats:
    """[n, n]: half the round trip from each of the nodes, peers or the client (None), to each."""
    index = {node: i for i, node in enumerate(nodes)}
    here_ms = _from_here_ms(nodes, times)
    # By the triangle inequality a round trip between two peers lies between the difference and the sum of those from
    # here to each. The middle of that is the larger of the two, which errs by no more than the smaller one. Where one
    # of the two is the client itself, at 0, it is exact.
    rtts_ms: Floats = np.maximum(here_ms[:, None], here_ms[None, :])
    # What peers measured themselves is better. Where both did, the longer counts: nobody shortens a way by himself.
    measured = sorted(
        (ms, index[peer.peer_id], index[other])
        for peer in published
        if peer.peer_id in index
        for other, ms in peer.rtts_ms
        if other in index
    )
    for ms, i, j in measured:
        rtts_ms[i, j] = rtts_ms[j, i] = ms
    for one, other in relayed:
        if one in index and other in index:
            i, j = index[one], index[other]
            rtts_ms[i, j] = rtts_ms[j, i] = here_ms[i] + here_ms[j]
    np.fill_diagonal(rtts_ms, 0.0)
    rtts_ms /= 2
    return rtts_ms
