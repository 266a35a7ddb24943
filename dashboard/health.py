"""How a swarm is: what its peers say of themselves, put together with whether they answer. Pure, and free of addresses.

Blocks count as served by peers that take sessions and have not failed to answer. A peer that was not asked yet counts:
nothing speaks against it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from dht.record import ModelRecord, PeerRecord
from dht.view import SwarmView
from protocol.hosts import host_of, is_global
from protocol.limits import WIRE_VERSION
from protocol.span import Span, missing_spans

PRIOR_STEP_MS = 1.0  # of a block, where a peer does not say


class Standing(StrEnum):
    """What a peer is to the swarm at the moment."""

    SERVING = "serving"
    UNASKED = "not asked yet"
    DRAINING = "draining"
    JOINING = "joining"
    SILENT = "does not answer"


@dataclass(frozen=True, slots=True)
class Reach:
    """Whether a peer answers this page, and how far it is from here.

    Attributes:
        answers: None: it was not asked yet.
        ever: it has answered before.
    """

    answers: bool | None = None
    rtt_ms: float | None = None
    ever: bool = False


@dataclass(frozen=True, slots=True)
class PeerHealth:
    """One peer.

    Attributes:
        record: what it says of itself.
        used_tokens_per_s: how fast its count of served tokens grew lately; None: it does not say.
        standing_since: seconds since 1970; as far back as this page has seen it.
    """

    record: PeerRecord
    reach: Reach
    standing: Standing
    used_tokens_per_s: float | None
    standing_since: float

    @property
    def counts(self) -> bool:
        """Are its blocks served?"""
        return self.standing in (Standing.SERVING, Standing.UNASKED)

    @property
    def free_tokens_per_s(self) -> float | None:
        """Of its throughput, what nobody uses; None: it was not measured yet."""
        if self.record.tokens_per_s is None:
            return None
        return max(0.0, self.record.tokens_per_s - (self.used_tokens_per_s or 0.0))

    @property
    def is_compatible(self) -> bool:
        """Does it speak this version's wire protocol?"""
        return self.record.wire_version == WIRE_VERSION

    @property
    def has_private_address(self) -> bool:
        """Does it announce an address that only its own network can reach?"""
        return bool(self.record.addresses) and not is_global(host_of(self.record.addresses[0]))


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """One model.

    Attributes:
        replicas: for each block, how many peers serve it.
        missing: blocks that nobody serves.
        weakest: the first longest run of blocks that fewest serve.
        tokens_per_s: what its weakest block can decode for all together in a second; None: not measured.
        free_tokens_per_s: of that, what nobody uses.
        token_ms: computing, waiting and the way of one token over the fastest chain, as far as this page can tell;
            None: there is no whole chain.
        kv_tokens_left: how many more cached tokens every block has room for.
        complete_since: seconds since 1970 since when all blocks are served, or are not.
    """

    name: str
    fingerprint: str
    n_blocks: int
    peers: tuple[PeerHealth, ...]
    replicas: tuple[int, ...]
    missing: tuple[Span, ...]
    weakest: Span
    tokens_per_s: float | None
    free_tokens_per_s: float | None
    token_ms: float | None
    kv_tokens_left: int
    kv_tokens_total: int
    software: Mapping[str, int]
    complete_since: float

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @property
    def blocks_served(self) -> int:
        return sum(1 for count in self.replicas if count)

    @property
    def answering(self) -> int:
        """How many peers answered this page when last asked."""
        return sum(1 for peer in self.peers if peer.reach.answers)


@dataclass(frozen=True, slots=True)
class Health:
    """The swarm. `as_of` 0: it was not read yet."""

    as_of: float = 0.0
    models: tuple[ModelHealth, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def peers(self) -> tuple[PeerHealth, ...]:
        return tuple(peer for model in self.models for peer in model.peers)

    @property
    def is_complete(self) -> bool:
        """Is there a model, and is every block of every model served?"""
        return bool(self.models) and all(model.is_complete for model in self.models)


Since = Mapping[str, tuple[str, float]]
"""By subject (a peer's id, a model's fingerprint): what it is, and since when."""


def standing(record: PeerRecord, reach: Reach) -> Standing:
    """What a peer is to the swarm."""
    if record.state == "joining" or not record.addresses:
        return Standing.JOINING
    if reach.answers is False:
        return Standing.SILENT
    if record.state == "draining":
        return Standing.DRAINING
    return Standing.UNASKED if reach.answers is None else Standing.SERVING


def assess(view: SwarmView, reach: Mapping[str, Reach], used: Mapping[str, float], since: Since) -> Health:
    """The swarm's health.

    Args:
        reach: of peers, by id.
        used: tokens per second that peers lately served, by id.
        since: what peers and models were when last assessed.
    """
    models = tuple(_model(model, view, reach, used, since) for model in view.models)
    return Health(view.as_of, models, view.dropped)


def _model(
    model: ModelRecord, view: SwarmView, reach: Mapping[str, Reach], used: Mapping[str, float], since: Since
) -> ModelHealth:
    peers = tuple(
        _peer(record, reach.get(record.peer_id, Reach()), used.get(record.peer_id), since, view.as_of)
        for record in view.peers(model.fingerprint)
    )
    serving = [peer for peer in peers if peer.counts and peer.is_compatible]
    replicas = tuple(map(int, _per_block(model.n_blocks, ((peer.record.span, 1) for peer in serving))))
    missing = missing_spans((peer.record.span for peer in serving), model.n_blocks)
    can = [(peer.record.span, peer.record.tokens_per_s) for peer in serving if peer.record.tokens_per_s is not None]
    free = [(peer.record.span, peer.free_tokens_per_s) for peer in serving if peer.free_tokens_per_s is not None]
    left = _per_block(model.n_blocks, ((peer.record.span, peer.record.kv_tokens_left) for peer in serving))
    total = _per_block(model.n_blocks, ((peer.record.span, peer.record.kv_tokens_total) for peer in serving))
    is_measured = len(can) == len(serving) > 0
    return ModelHealth(
        name=model.name,
        fingerprint=model.fingerprint,
        n_blocks=model.n_blocks,
        peers=peers,
        replicas=replicas,
        missing=missing,
        weakest=weakest(replicas),
        tokens_per_s=min(_per_block(model.n_blocks, can)) if is_measured else None,
        free_tokens_per_s=min(_per_block(model.n_blocks, free)) if is_measured else None,
        token_ms=token_ms(model.n_blocks, serving),
        kv_tokens_left=int(min(left)),
        kv_tokens_total=int(min(total)),
        software=MappingProxyType(dict(Counter(peer.record.software or "unknown" for peer in peers).most_common())),
        complete_since=_since(since, model.fingerprint, completeness(not missing), view.as_of),
    )


def _peer(record: PeerRecord, reach: Reach, used: float | None, since: Since, now: float) -> PeerHealth:
    now_is = standing(record, reach)
    return PeerHealth(record, reach, now_is, used, _since(since, record.peer_id, now_is, now))


def completeness(is_complete: bool) -> str:
    """What a model is, for `Since`."""
    return "complete" if is_complete else "incomplete"


def _since(since: Since, subject: str, state: str, now: float) -> float:
    before, at = since.get(subject, ("", now))
    return at if before == state else now


def _per_block(n_blocks: int, parts: Iterable[tuple[Span, float]]) -> list[float]:
    """The sum over the spans that hold it, for each block."""
    sums = [0.0] * n_blocks
    for span, amount in parts:
        for block in range(span.start, min(span.stop, n_blocks)):
            sums[block] += amount
    return sums


def weakest(replicas: Sequence[float]) -> Span:
    """The longest run of blocks that fewest peers serve; of equally long ones, the first."""
    least = min(replicas)
    best = start = None
    for block, count in enumerate([*replicas, math.inf]):
        if count == least and start is None:
            start = block
        elif count != least and start is not None:
            run = Span(start, block)
            best = run if best is None or len(run) > len(best) else best
            start = None
    assert best is not None
    return best


def token_ms(n_blocks: int, peers: Sequence[PeerHealth]) -> float | None:
    """Milliseconds of one token over the fastest chain; None: there is no whole one.

    Computing and waiting are the peers' own measurements. To go to a peer costs half its round trip from this page,
    which is the only distance that is known of all of them; so does the way back from the last one.
    """
    reached: dict[int, float] = {}  # by peer: to have the blocks so far computed, there the last
    for block in range(n_blocks):
        cheapest = min(reached.values(), default=0.0 if block == 0 else math.inf)
        reached = {
            index: min(reached.get(index, math.inf), cheapest + _arrival_ms(peer)) + _block_ms(peer)
            for index, peer in enumerate(peers)
            if block in peer.record.span
        }
    ends = [cost + (peers[index].reach.rtt_ms or 0.0) / 2 for index, cost in reached.items()]
    best = min(ends, default=math.inf)
    return best if math.isfinite(best) else None


def _arrival_ms(peer: PeerHealth) -> float:
    return (peer.reach.rtt_ms or 0.0) / 2 + (peer.record.queue_ms or 0.0)


def _block_ms(peer: PeerHealth) -> float:
    if peer.record.step_ms is None:
        return PRIOR_STEP_MS
    return peer.record.step_ms / len(peer.record.span)


def used_tokens_per_s(before: PeerRecord, after: PeerRecord) -> float | None:
    """How fast a peer's count of served tokens grew between two of its records; None: they do not say."""
    if before.tokens_served is None or after.tokens_served is None or before.started_at != after.started_at:
        return None
    passed_s = (after.sequence - before.sequence) / 1e9  # a sequence is the nanosecond of issue
    return max(0, after.tokens_served - before.tokens_served) / passed_s if passed_s > 0 else None
