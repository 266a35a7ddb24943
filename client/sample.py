"""The tokens of one hop that were compared last: is the distance that is typical of them too large? Pure.

A single token may be odd, and is allowed much. Numbers that are coarser than a peer says are off by a little in every
token, which the median shows long before any of them stands out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from torch import Tensor

LEAST = 16  # tokens whose median says something
MOST = 64  # tokens that are kept: of each two outputs, one row


@dataclass(frozen=True, slots=True)
class Compared:
    """One token of one row, computed by a hop and by its shadow.

    Attributes:
        row: of the step that computed it.
        position: in the caches.
        committed, recomputed: the hop's output for it and the shadow's, [..., 1, 1, H].
        apart: their distance.
    """

    row: int
    position: int
    committed: Tensor
    recomputed: Tensor
    apart: float

    def alone(self) -> Compared:
        """Without the rest of the step, which its tensors may be views of."""
        return replace(self, committed=self.committed.clone(), recomputed=self.recomputed.clone())


class Sample:
    """Of one hop and one shadow of it.

    Attributes:
        first: position of the first token that was compared; None: none was.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._kept: list[Compared] = []

    def take(self, tokens: Sequence[Compared], limit: float) -> tuple[Compared, ...] | None:
        """Adds tokens, one for each position, in order; what was kept of theirs and of later positions gives way.

        Returns:
            The first tokens in a row, `LEAST` to `MOST` of them, whose median distance is beyond the limit; None: there
            are none.
        """
        if not tokens:
            return None
        start = tokens[0].position
        self.first = start if self.first is None else min(self.first, start)
        kept = [token for token in self._kept if token.position < start]
        for token in tokens:
            kept = [*kept[1 - MOST :], token]
            if len(kept) >= LEAST and median_low([each.apart for each in kept]) > limit:
                return tuple(kept)
        self._kept = [token.alone() for token in kept]
        return None
