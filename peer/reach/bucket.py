"""A bucket of bytes: how fast a relay may carry. Pure; the caller says what time it is."""

from __future__ import annotations


class Bucket:
    """Fills steadily. What is carried is taken out afterwards, below zero if need be, so that a small message among few
    others never waits; whoever took then rests until there is something in it again.

    Args:
        bytes_per_s: how fast it fills.
        burst_bytes: how much it holds.
        now_s: monotonic seconds, as later.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: float, now_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._level = burst_bytes
        self._at_s = now_s

    def take(self, nbytes: int, now_s: float) -> float:
        """Takes out what was carried; returns for how many seconds to rest."""
        filled = self._level + max(0.0, now_s - self._at_s) * self._bytes_per_s
        self._at_s = now_s
        self._level = min(self._burst_bytes, filled) - nbytes
        return max(0.0, -self._level / self._bytes_per_s)
