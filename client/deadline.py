"""How long a step may take before the client asks where it is. Pure: no clock."""

from __future__ import annotations

import math
from collections import deque

LEAST_S = 1.0
MOST_PRIOR_S = 60.0  # whatever peers say of themselves
FACTOR = 3.0  # of what 95 % of the steps took
REMEMBERED = 64  # steps
SHARED = 16.0  # a token of a prefill takes about so many times less than one alone, until it is measured


class StepTimes:
    """Times of one session's steps over its whole chain.

    To ask costs a few bytes and is no verdict, so a guess will do until there are measurements.

    Args:
        prior_s: seconds for one token, until they are measured.
    """

    def __init__(self, prior_s: float = 0.0) -> None:
        self.prior_s = prior_s
        self._single_s: deque[float] = deque(maxlen=REMEMBERED)
        self._per_token_s: deque[float] = deque(maxlen=REMEMBERED)

    def note(self, tokens: int, took_s: float) -> None:
        """A step of `tokens` (per row) was through after `took_s`."""
        (self._single_s if tokens == 1 else self._per_token_s).append(took_s / tokens)

    def allowance_s(self, tokens: int, least_s: float = LEAST_S) -> float:
        """Seconds to wait for a step of `tokens` before asking; never less than `least_s`."""
        single_s = _p95(self._single_s, min(self.prior_s, MOST_PRIOR_S))
        per_token_s = _p95(self._per_token_s, single_s / SHARED)
        expected_s = single_s if tokens == 1 else single_s + tokens * per_token_s
        return max(least_s, FACTOR * expected_s)


def _p95(times_s: deque[float], otherwise_s: float) -> float:
    if not times_s:
        return otherwise_s
    return sorted(times_s)[math.ceil(0.95 * len(times_s)) - 1]
