"""What is measured on a simulated swarm as time passes: coverage, replicas, and the weakest block's throughput."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protocol.span import Span

BIN_S = 300.0
"""Width of the bins of the curves over time."""
MOST_REPLICAS = 5


@dataclass(slots=True)
class Curve:
    """Time-weighted sums in bins of `BIN_S`."""

    sums: dict[int, float] = field(default_factory=dict)

    def add(self, start_s: float, stop_s: float, value: float) -> None:
        while start_s < stop_s:
            index = int(start_s // BIN_S)
            edge_s = min(stop_s, (index + 1) * BIN_S)
            self.sums[index] = self.sums.get(index, 0.0) + value * (edge_s - start_s)
            start_s = edge_s


class Meter:
    """Counts over one model's blocks, from `started_s` on. Only peers that take new sessions count as serving."""

    def __init__(self, n_blocks: int, started_s: float) -> None:
        self.n_blocks = n_blocks
        self.started_s = started_s
        self.replicas = np.zeros(n_blocks, dtype=np.int64)
        self.tokens_per_s = np.zeros(n_blocks)
        self.total_blocks_per_s = 0.0
        self.uncovered_block_s = 0.0
        self.gap_s = 0.0
        self.gaps = 0
        self._in_gap = False
        self.replica_block_s = np.zeros(MOST_REPLICAS + 1)
        self.weakest_token = 0.0
        self.bound_token = 0.0
        self.uncovered = Curve()
        self.weakest = Curve()
        self.bound = Curve()
        self._now_s = 0.0

    @property
    def seconds(self) -> float:
        return self._now_s - self.started_s

    def serve(self, now_s: float, span: Span, blocks_per_s: float) -> None:
        self.advance(now_s)
        self._add(span, blocks_per_s, 1)

    def unserve(self, now_s: float, span: Span, blocks_per_s: float) -> None:
        self.advance(now_s)
        self._add(span, blocks_per_s, -1)

    def _add(self, span: Span, blocks_per_s: float, sign: int) -> None:
        self.replicas[span.start : span.stop] += sign
        self.tokens_per_s[span.start : span.stop] += sign * blocks_per_s / len(span)
        self.total_blocks_per_s += sign * blocks_per_s

    def advance(self, now_s: float) -> None:
        """The time until `now_s` passed with what was served so far."""
        since_s = max(self._now_s, self.started_s)
        lasted_s = now_s - since_s
        self._now_s = now_s
        if lasted_s <= 0:
            return
        counts = np.bincount(np.minimum(self.replicas, MOST_REPLICAS), minlength=MOST_REPLICAS + 1)
        uncovered = int(counts[0])
        weakest = 0.0 if uncovered else float(self.tokens_per_s.min())
        bound = self.total_blocks_per_s / self.n_blocks
        self.uncovered_block_s += uncovered * lasted_s
        self.gap_s += lasted_s if uncovered else 0.0
        self.gaps += bool(uncovered) and not self._in_gap
        self._in_gap = bool(uncovered)
        self.replica_block_s += counts * lasted_s
        self.weakest_token += weakest * lasted_s
        self.bound_token += bound * lasted_s
        self.uncovered.add(since_s, now_s, uncovered / self.n_blocks)
        self.weakest.add(since_s, now_s, weakest)
        self.bound.add(since_s, now_s, bound)
