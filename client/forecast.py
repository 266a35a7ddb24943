"""How long steps should take along a chain, by what is known of its peers; and what their results add to that. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from client.chain import Link
from client.chunks import HopCost
from client.costs import HOP_MS, block_times_ms
from client.deadline import SHARED
from client.times import Stopwatch, Times
from protocol.messages import HopTrace


def expected_s(links: Iterable[Link], times: Times) -> float:
    """Seconds that a step of one token should take, the ways between the peers included."""
    total_ms = 0.0
    for link in links:
        peer, blocks = link.peer, len(link.span)
        said_ms = (peer.step_ms or 0.0) * blocks / len(peer.span) + (peer.queue_ms or 0.0)
        total_ms += times.expected_ms(peer.peer_id, blocks, 1) or said_ms
        total_ms += times.rtts_ms.get(peer.peer_id, 0.0)
    return total_ms / 1e3


def hop_costs(links: Sequence[Link], times: Times) -> tuple[HopCost, ...]:
    """What each hop should take for the chunks of a prompt."""
    costs = []
    for link, block_ms in zip(links, block_times_ms([link.peer for link in links], times, 1), strict=True):
        token_ms, blocks = times.of(link.peer.peer_id).token_ms, len(link.span)
        costs.append(
            HopCost(
                HOP_MS + blocks * block_ms,
                blocks * (block_ms / SHARED if token_ms is None else token_ms),
                link.peer.device or link.peer.peer_id,
            )
        )
    return tuple(costs)


def learn(links: Iterable[Link], tokens: int, said: Iterable[HopTrace], stopwatch: Stopwatch) -> None:
    """A step of `tokens` per row went along the chain: what its peers said of it is noted, for routes to come."""
    by_start = {link.span.start: link for link in links}
    for cost in said:
        if (link := by_start.get(cost.start)) is not None:
            stopwatch.note(
                link.peer.peer_id, len(link.span), tokens, cost.compute_ms, cost.queue_ms, cost.kv_tokens_left
            )
