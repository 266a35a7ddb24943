"""How often somebody may ask for something that costs others. Pure; the caller says what time it is."""

from __future__ import annotations

from collections import Counter


class Quota:
    """So many requests in each window of time: from one block of addresses, and in all.

    Args:
        window_s: monotonic seconds are cut into windows of so many.
    """

    def __init__(self, per_block: int, overall: int, window_s: float) -> None:
        self._per_block = per_block
        self._overall = overall
        self._window_s = window_s
        self._window = -1
        self._asked: Counter[str] = Counter()

    def admit(self, block: str, now_s: float) -> float:
        """Takes one request, if there may be one; else returns after how many seconds to come again."""
        window = int(now_s // self._window_s)
        if window != self._window:
            self._window = window
            self._asked.clear()
        if self._asked[block] >= self._per_block or self._asked.total() >= self._overall:
            return (window + 1) * self._window_s - now_s
        self._asked[block] += 1
        return 0.0
