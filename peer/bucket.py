"""A bucket: how much of something there may be in the long run, and at once. Pure; the caller says what time it is."""

from __future__ import annotations

import math


class Bucket:
    """Something of which `per_s` comes in each second, and at most `most` is saved up. What is taken may exceed what is
    there: so small amounts among few others never wait, and whoever took then rests until there is something again."""

    def __init__(self, per_s: float, most: float) -> None:
        self._per_s = per_s
        self._most = most
        self._level = most
        self._at_s = -math.inf

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is there; 0: now."""
        self._fill(now_s)
        return max(0.0, (amount - self._level) / self._per_s)

    def take(self, amount: float, now_s: float) -> float:
        """Takes `amount`, on credit if need be. Returns for how many seconds to rest."""
        self._fill(now_s)
        self._level -= amount
        return self.wait_s(0.0, now_s)

    def _fill(self, now_s: float) -> None:
        if now_s > self._at_s:
            self._level = min(self._most, self._level + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
