"""What a client knows of peers' times by itself: round trips, step times, queues. Pure: the clock is passed in.

`Stopwatch` is told of each measurement; `Times` is what it knows at one moment, for routing and for deadlines.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from protocol.mean import smoothed

FORGET_S = 300.0  # a round trip, or a peer's samples, not renewed for so long
LIVE_S = 60.0  # step times, queues and free KV are news for so long; then the peer's record is newer
SAMPLES = 64  # of each kind, per peer
PERCENTILE = 0.95


@dataclass(frozen=True, slots=True)
class Sample:
    """One step on one peer, scaled down: milliseconds in its queue, and of computing per block and token."""

    queue_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """What is known of one peer. None: not measured lately.

    Attributes:
        block_ms: one token per row through one block.
        token_ms: the same in a prefill, where many tokens share the work.
        queue_ms: waiting before the step.
        kv_tokens_left: as its last reply said.
        decode, prefill: the last steps of one, and of several tokens per row.
    """

    block_ms: float | None = None
    token_ms: float | None = None
    queue_ms: float | None = None
    kv_tokens_left: int | None = None
    decode: tuple[Sample, ...] = ()
    prefill: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Times:
    """What a client knows at one moment.

    Attributes:
        rtts_ms: round-trip times from here, by peer id.
        by_peer: what its steps have shown, by peer id.
    """

    rtts_ms: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    by_peer: Mapping[str, PeerTimes] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, peer_id: str) -> PeerTimes:
        """What is known of a peer; a blank where that is nothing."""
        return self.by_peer.get(peer_id, _UNKNOWN)

    def expected_ms(self, peer_id: str, blocks: int, tokens: int) -> float | None:
        """Milliseconds, queue included, that 19 of 20 steps of `tokens` per row through so many blocks stay below.

        The way there and back is not in it. A prefill takes at least as long as a decode step, and where none was seen
        yet, as long as so many decode steps. A prefill says nothing of decode steps: these share no work.

        Returns:
            None: no such steps of this peer were measured lately.
        """
        known = self.of(peer_id)
        decode_ms = _percentile([s.queue_ms + blocks * s.compute_ms for s in known.decode])
        if tokens == 1:
            return decode_ms
        samples = known.prefill or known.decode
        prefill_ms = _percentile([s.queue_ms + blocks * tokens * s.compute_ms for s in samples])
        return prefill_ms if decode_ms is None or prefill_ms is None else max(decode_ms, prefill_ms)


_UNKNOWN = PeerTimes()


def _percentile(values: Sequence[float]) -> float | None:
    """The value that PERCENTILE of them do not exceed: the nearest rank, hence one that was measured."""
    if not values:
        return None
    return sorted(values)[math.ceil(PERCENTILE * len(values)) - 1]


@dataclass(slots=True)
class _Watched:
    """One peer, as its measurements come in."""

    rtt_ms: float | None = None
    rtt_at_s: float = -math.inf
    noted_at_s: float = -math.inf
    block_ms: float | None = None
    token_ms: float | None = None
    queue_ms: float | None = None
    kv_tokens_left: int | None = None
    decode: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    prefill: deque[Sample] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    def add_rtt(self, rtt_ms: float, now_s: float) -> None:
        self.rtt_ms = smoothed(self.rtt_at(now_s), rtt_ms)
        self.rtt_at_s = now_s

    def add_step(self, tokens: int, sample: Sample, kv_tokens_left: int, now_s: float) -> None:
        if now_s - self.noted_at_s > LIVE_S:
            self.block_ms = self.token_ms = self.queue_ms = None
        if now_s - self.noted_at_s > FORGET_S:
            self.decode.clear()
            self.prefill.clear()
        self.noted_at_s = now_s
        if tokens == 1:
            self.block_ms = smoothed(self.block_ms, sample.compute_ms)
            self.decode.append(sample)
        else:
            self.token_ms = smoothed(self.token_ms, sample.compute_ms)
            self.prefill.append(sample)
        self.queue_ms = smoothed(self.queue_ms, sample.queue_ms)
        self.kv_tokens_left = kv_tokens_left

    def is_forgotten(self, now_s: float) -> bool:
        return now_s - max(self.rtt_at_s, self.noted_at_s) > FORGET_S

    def rtt_at(self, now_s: float) -> float | None:
        return self.rtt_ms if now_s - self.rtt_at_s <= FORGET_S else None

    def at(self, now_s: float) -> PeerTimes | None:
        """What its steps have shown that is not forgotten; what is no longer live is left out."""
        if now_s - self.noted_at_s > FORGET_S:
            return None
        decode, prefill = tuple(self.decode), tuple(self.prefill)
        if now_s - self.noted_at_s > LIVE_S:
            return PeerTimes(decode=decode, prefill=prefill)
        return PeerTimes(self.block_ms, self.token_ms, self.queue_ms, self.kv_tokens_left, decode, prefill)


class Stopwatch:
    """Collects measurements; forgets a peer of which it has heard nothing for `FORGET_S`. For any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_peer: dict[str, _Watched] = {}
        self._lock = threading.Lock()

    def note_rtt(self, peer_id: str, rtt_ms: float) -> None:
        """A round trip to the peer took so long."""
        now_s = self._clock()
        with self._lock:
            self._by_peer.setdefault(peer_id, _Watched()).add_rtt(rtt_ms, now_s)

    def note(
        self, peer_id: str, blocks: int, tokens: int, compute_ms: float, queue_ms: float, kv_tokens_left: int
    ) -> None:
        """A peer's reply: a step of `tokens` per row through so many of its blocks, and what it said of it."""
        now_s = self._clock()
        sample = Sample(queue_ms, compute_ms / (blocks * tokens))
        with self._lock:
            self._by_peer.setdefault(peer_id, _Watched()).add_step(tokens, sample, kv_tokens_left, now_s)

    def rtt_age_s(self, peer_id: str) -> float:
        """Seconds since the last round trip to the peer was measured; infinite if there was none."""
        now_s = self._clock()
        with self._lock:
            watched = self._by_peer.get(peer_id)
            return math.inf if watched is None else now_s - watched.rtt_at_s

    def snapshot(self) -> Times:
        """What is known now."""
        now_s = self._clock()
        with self._lock:
            self._by_peer = {p: watched for p, watched in self._by_peer.items() if not watched.is_forgotten(now_s)}
            rtts_ms = {p: ms for p, watched in self._by_peer.items() if (ms := watched.rtt_at(now_s)) is not None}
            by_peer = {p: known for p, watched in self._by_peer.items() if (known := watched.at(now_s)) is not None}
        return Times(MappingProxyType(rtts_ms), MappingProxyType(by_peer))
