"""Choosing a chain: which peers run which blocks. Pure: no sockets, no clock."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from client.costs import Costs, Places, estimate
from client.rules import Rules
from client.times import Times
from dht.record import PeerRecord
from protocol.errors import BlocksMissing
from protocol.span import Span, missing_spans

NAMED = 3  # peers, in a message on what the rules leave out


@dataclass(frozen=True, slots=True)
class Link:
    """One hop of a chain: the peer, and the blocks of its span that the chain uses."""

    peer: PeerRecord
    span: Span


def agreed_codec(peers: Iterable[PeerRecord], n_blocks: int, wanted: Sequence[str]) -> str:
    """The first of the codecs `wanted` that peers covering the whole model speak; the first one if there is none.

    Results travel from peer to peer undecoded, so one codec is used in the whole chain. A peer that offers odd codecs
    takes itself out of the choice, nobody else.
    """
    known = list(peers)
    for codec in wanted:
        if not missing_spans([peer.span for peer in known if codec in peer.codecs], n_blocks):
            return codec
    return wanted[0]


def choose_chain(
    peers: Iterable[PeerRecord],
    wanted: Span,
    *,
    times: Times | None = None,
    avoid: Collection[str] = (),
    relayed: Collection[tuple[str, str]] = (),
    rules: Rules | None = None,
    previous: str | None = None,
    following: str | None = None,
    cuts: Collection[int] | None = None,
    kv_tokens: int = 0,
    tokens: int = 1,
    busy_ms: Mapping[str, float] | None = None,
    rng: random.Random | None = None,
) -> tuple[Link, ...]:
    """Links that cover `wanted` in order, expected to be the fastest for one step: see `client.costs`.

    Shortest path over (peer, block), after Petals' sequence manager; a chain may leave a peer in the middle of its span
    for a faster one, and may come back to it. Each peer counts as up to a tenth slower at random, so that clients
    spread: a chosen chain is at most that much slower than the best one, where no block has more peers than are
    considered. 1,000 peers of 80 blocks take about 25 ms.

    Args:
        times: what this client has measured itself.
        avoid: ids of peers that failed lately; used only where nobody else serves the blocks.
        relayed: pairs of ids of peers that do not reach each other, so that the client carries what goes between them.
        rules: which peers a person wants to be used.
        previous, following: ids of the peers before and after `wanted`, where a lost part of a chain is replaced; None:
            the client.
        cuts: the blocks before which the model may be cut; None: where peers' spans begin or end, which is always
            allowed.
        kv_tokens: rows x tokens that the session will hold; a peer with less room counts as one of `avoid`.
        tokens: rows x tokens of the steps to come; 1: decode steps.
        busy_ms: what the caller will ask of peers at the same time, beside their queues.

    Raises:
        BlocksMissing: some blocks of `wanted` have no online peer, or none that the rules allow.
    """
    times, rules = times or Times(), rules or Rules()
    published = list(peers)
    online = [peer for peer in published if peer.state == "online" and peer.span.overlap(wanted)]
    allowed = [peer for peer in online if rules.allows(peer)]
    usable = [(peer, part) for peer in allowed if (part := _usable(peer.span, wanted, cuts)) is not None]
    if _gaps([part for _, part in usable], wanted):
        raise blocks_missing(online, wanted, rules=rules, cuts=cuts)
    costs = estimate(
        usable,
        wanted,
        times=times,
        avoid=avoid,
        rules=rules,
        places=Places(previous, following, relayed),
        published=published,
        kv_tokens=kv_tokens,
        tokens=tokens,
        busy_ms=busy_ms or {},
        rng=rng or random.Random(),
    )
    edges = {edge for _, part in usable for edge in (part.start, part.stop)} if cuts is None else set(cuts)
    hops = _shortest(costs, {edge - wanted.start for edge in edges})
    return tuple(Link(costs.peers[i], Span(wanted.start + start, wanted.start + stop)) for i, start, stop in hops)


def _usable(span: Span, wanted: Span, cuts: Collection[int] | None) -> Span | None:
    """The part of `wanted` that a peer of this span can run, between two legal cuts; None: there is none."""
    part = span.overlap(wanted)
    if part is None or cuts is None:
        return part
    legal = sorted({wanted.start, wanted.stop, *cuts})
    start, stop = legal[bisect_left(legal, part.start)], legal[bisect_right(legal, part.stop) - 1]
    return Span(start, stop) if start < stop else None


def _shortest(costs: Costs, cuts: Collection[int]) -> list[tuple[int, int, int]]:
    """The cheapest way through all blocks: (peer, first block, block after the last) of each hop, in order.

    Goes block by block, and keeps for each peer the cheapest way to have come to it. Every block has a peer.

    Args:
        cuts: the blocks before which a chain may go on to another peer.
    """
    n, n_blocks = costs.block_ms.shape
    reached_ms = costs.first_ms  # at the peer, with all blocks before done
    came_from = np.full((n_blocks, n), -1)  # the peer before, where a peer is best entered at this block
    for block in range(n_blocks):
        serving = np.flatnonzero(np.isfinite(costs.block_ms[:, block]))
        if block and block in cuts:
            leaving = np.flatnonzero(np.isfinite(reached_ms))
            through_ms = reached_ms[leaving, None] + costs.switch_ms[np.ix_(leaving, serving)]
            best = through_ms.argmin(axis=0)
            entered_ms = through_ms[best, np.arange(len(serving))]
            better = entered_ms < reached_ms[serving]
            reached_ms[serving[better]] = entered_ms[better]
            came_from[block, serving[better]] = leaving[best[better]]
        reached_ms = reached_ms + costs.block_ms[:, block]
    peer, stop = int(np.argmin(reached_ms + costs.last_ms)), n_blocks
    hops: list[tuple[int, int, int]] = []
    for block in reversed(range(n_blocks)):
        before = int(came_from[block, peer])
        if before >= 0 or block == 0:
            hops.append((peer, block, stop))
            peer, stop = before, block
    return hops[::-1]


def blocks_missing(
    online: Iterable[PeerRecord],
    wanted: Span,
    *,
    rules: Rules | None = None,
    cuts: Collection[int] | None = None,
) -> BlocksMissing:
    """The error that names the spans of `wanted` that no online peer serves; or else those that the rules take away."""
    rules = rules or Rules()
    usable = [(peer, part) for peer in online if (part := _usable(peer.span, wanted, cuts)) is not None]
    gaps = _gaps([part for _, part in usable], wanted)
    left_out: list[PeerRecord] = []
    if not gaps:
        gaps = _gaps([part for peer, part in usable if rules.allows(peer)], wanted)
        left_out = [p for p, part in usable if not rules.allows(p) and any(part.overlap(gap) for gap in gaps)]
    missing = [str(gap) for gap in gaps] or [str(wanted)]
    blocks = ", ".join(missing)
    if left_out:
        names = ", ".join(peer.peer_id[-8:] for peer in left_out[:NAMED]) + (", ..." if left_out[NAMED:] else "")
        verb = "is" if len(missing) == 1 and len(wanted) == 1 else "are"
        message = f"blocks {blocks} {verb} served only by peers that {rules.excluding()} leaves out: {names}"
    else:
        verb = "has" if len(missing) == 1 and len(wanted) == 1 else "have"
        message = f"blocks {blocks} {verb} no peer"
    return BlocksMissing(message, missing=missing)


def _gaps(spans: Iterable[Span], wanted: Span) -> list[Span]:
    """The parts of `wanted` that none of the spans touches."""
    return [part for gap in missing_spans(set(spans), wanted.stop) if (part := gap.overlap(wanted)) is not None]
