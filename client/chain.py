"""Choosing a chain: which peers run which blocks. Pure: no sockets, no clock."""

from __future__ import annotations

import heapq
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from dht.record import PeerRecord
from protocol.errors import BlocksMissing
from protocol.span import Span, missing_spans

AVOIDED_COST = 100.0  # a blamed peer is worse than any detour, and better than nothing


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
    avoid: Collection[str] = (),
    rng: random.Random | None = None,
) -> tuple[Link, ...]:
    """Links that cover `wanted` in order: fewest hops, then least loaded, then at random.

    Dijkstra over block boundaries (after Petals' sequence manager); an edge is a peer run to the end of its span.

    Args:
        avoid: ids of peers that failed lately; used only where nobody else serves the blocks.

    Raises:
        BlocksMissing: some blocks of `wanted` have no online peer.
    """
    online = [peer for peer in peers if peer.state == "online" and peer.span.overlap(wanted)]
    rng = rng or random.Random()
    best: dict[int, float] = {wanted.start: 0.0}
    reached_by: dict[int, tuple[int, Link]] = {}
    frontier = [(0.0, wanted.start)]
    while frontier:
        cost, block = heapq.heappop(frontier)
        if cost > best[block]:
            continue
        if block == wanted.stop:
            return _unwind(reached_by, wanted)
        for peer in online:
            if block not in peer.span:
                continue
            stop = min(peer.span.stop, wanted.stop)
            through = cost + _hop_cost(peer, avoid, rng)
            if through < best.get(stop, float("inf")):
                best[stop] = through
                reached_by[stop] = (block, Link(peer, Span(block, stop)))
                heapq.heappush(frontier, (through, stop))
    raise blocks_missing(online, wanted)


def _hop_cost(peer: PeerRecord, avoid: Collection[str], rng: random.Random) -> float:
    """One for the hop, a fraction for the peer's load, a trifle of chance to spread clients over equals."""
    used = 1.0 - peer.kv_tokens_left / peer.kv_tokens_total if peer.kv_tokens_total else 1.0
    return 1.0 + 0.1 * used + 0.001 * rng.random() + (AVOIDED_COST if peer.peer_id in avoid else 0.0)


def _unwind(reached_by: dict[int, tuple[int, Link]], wanted: Span) -> tuple[Link, ...]:
    links: list[Link] = []
    block = wanted.stop
    while block != wanted.start:
        block, link = reached_by[block]
        links.append(link)
    return tuple(reversed(links))


def blocks_missing(online: Iterable[PeerRecord], wanted: Span) -> BlocksMissing:
    """The error that names the spans of `wanted` that no online peer serves."""
    gaps = [gap for gap in missing_spans([peer.span for peer in online], wanted.stop) if gap.overlap(wanted)]
    missing = [str(gap.overlap(wanted)) for gap in gaps]
    blocks = ", ".join(missing) or str(wanted)
    verb = "has" if len(missing) == 1 and len(wanted) == 1 else "have"
    return BlocksMissing(f"blocks {blocks} {verb} no peer", missing=missing)
