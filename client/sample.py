"""The tokens of one hop that were compared last: is the distance that is typical of them too large? Pure.

A single token may be odd, and is allowed much. Numbers that are coarser than a peer says are off by a little in every
token, which the median shows long before any of them stands out. Where tokens choose their experts, rounding now and
then chooses another one, and an honest token stands out: there only several of them say something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median_low

from torch import Tensor

LEAST = 16  # tokens whose median says something
MOST = 64  # tokens that are kept: of each two outputs, one row
SEVERAL = 8  # of those, beyond what a single token may be off: four times what was seen of honest peers


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


@dataclass(frozen=True, slots=True)
class Far:
    """Tokens that are further off than they may be.

    Attributes:
        tokens: `SEVERAL` of which each is beyond the limit, or `LEAST` to `MOST` of which the median is.
        limit: for these.
        first: position of the first token in doubt.
        is_typical: is it the median?
    """

    tokens: tuple[Compared, ...]
    limit: float
    first: int
    is_typical: bool


class Sample:
    """Of one hop and one shadow of it.

    Attributes:
        first: position of the first token that was compared; None: none was.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._kept: list[Compared] = []

    def take(self, tokens: Sequence[Compared], limit: float, alone: float = math.inf) -> Far | None:
        """Adds tokens, one for each position, in order; what was kept of theirs and of later positions gives way.

        Args:
            limit: for the median.
            alone: of the tokens kept, fewer than `SEVERAL` may be beyond this.

        Returns:
            The first tokens that are too far off; None: there are none.
        """
        if not tokens:
            return None
        start = tokens[0].position
        self.first = start if self.first is None else min(self.first, start)
        kept = [token for token in self._kept if token.position < start]
        for token in tokens:
            kept = [*kept[1 - MOST :], token]
            if len(kept) >= LEAST and median_low([each.apart for each in kept]) > limit:
                return Far(tuple(kept), limit, self.first, is_typical=True)
            odd = [each for each in kept if each.apart > alone]
            if len(odd) >= SEVERAL:
                return Far(tuple(odd), alone, odd[0].position, is_typical=False)
        self._kept = [token.alone() for token in kept]
        return None
