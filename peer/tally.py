"""What a span's host has done so far, counted. Pure. The event loop writes, any thread may read, without a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEPS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TOKENS = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")


class Histogram:
    """How many values were at most as large as each of some bounds.

    Args:
        bounds: ascending; values above the last one are counted, too.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def buckets(self) -> list[tuple[float, int]]:
        """Each bound, infinity last, with how many values were at most as large."""
        return list(_summed((*self.bounds, float("inf")), list(self._counts)))


def _summed(bounds: tuple[float, ...], counts: list[int]) -> Iterator[tuple[float, int]]:
    total = 0
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        yield bound, total


@dataclass(slots=True)
class Tally:
    """Counts since the host opened.

    Attributes:
        step_s: from a step's arrival until it was through, by kind.
        queued_s: of these, until it was begun.
        computed: tokens that went through the blocks, by kind.
        pass_s, pass_steps, pass_tokens: of each pass: how long it took, and of how much it was made.
        tokens_in, bytes_in: of the steps that were taken.
        tokens_out, bytes_out: of the outputs that were handed on.
        handed_on: outputs by way: `pushed` to the next peer, `relayed` by the client, which could be told where that
            peer could not, or `answered`: the client wants what the last block says.
        refusals: what clients and peers were told instead of an answer, by the error's code.
    """

    step_s: dict[str, Histogram] = field(default_factory=lambda: {kind: Histogram(SECONDS) for kind in KINDS})
    queued_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    computed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    pass_s: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    pass_steps: Histogram = field(default_factory=lambda: Histogram(STEPS))
    pass_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    tokens_in: int = 0
    bytes_in: int = 0
    tokens_out: int = 0
    bytes_out: int = 0
    handed_on: Counter[str] = field(default_factory=lambda: Counter(pushed=0, relayed=0, answered=0))
    refusals: Counter[str] = field(default_factory=Counter)
