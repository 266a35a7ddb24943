"""A span: contiguous transformer blocks `[start, stop)`, written `start:stop`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The blocks `start, start + 1, ..., stop - 1`. Never empty, never negative.

    Raises:
        ValueError: `start < 0` or `stop <= start`.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.stop <= self.start:
            raise ValueError(f"{self.start}:{self.stop} is not a span of blocks")

    @classmethod
    def parse(cls, text: str) -> Span:
        """`"10:20"` -> Span(10, 20).

        Raises:
            ConfigError: the text is not two whole numbers with a colon between, the first one smaller.
        """
        start, colon, stop = text.partition(":")
        try:
            if not colon:
                raise ValueError(text)
            return cls(int(start), int(stop))
        except ValueError:
            raise ConfigError(
                f"{text!r} is not a span of blocks; write FIRST:END, e.g. 10:20 for the blocks 10 to 19"
            ) from None

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.stop

    def covers(self, other: Span) -> bool:
        """Does every block of `other` lie in this span?"""
        return self.start <= other.start and other.stop <= self.stop

    def overlap(self, other: Span) -> Span | None:
        """The blocks in both, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None


def missing_spans(covered: Iterable[Span], n_blocks: int) -> tuple[Span, ...]:
    """The maximal spans of `[0, n_blocks)` that no span of `covered` touches, in order."""
    gaps: list[Span] = []
    reached = 0
    for span in sorted(covered):
        if span.start > reached:
            gaps.append(Span(reached, min(span.start, n_blocks)))
        reached = max(reached, span.stop)
        if reached >= n_blocks:
            break
    if reached < n_blocks:
        gaps.append(Span(reached, n_blocks))
    return tuple(gap for gap in gaps if gap.start < n_blocks)
