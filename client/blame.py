"""Blame: which peers failed this client lately. Local, and it decays: a peer is avoided, never banned."""

from __future__ import annotations

import time
from collections.abc import Callable


class Blame:
    """Remembers failures for a while.

    Args:
        avoid_s: seconds that a failed peer is avoided, where it did not say itself when to come back.
        clock: seconds, monotonic.
    """

    def __init__(self, avoid_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._avoid_s = avoid_s
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def add(self, peer_id: str, retry_after_s: float | None = None) -> None:
        """The peer failed, or is full until `retry_after_s` from now."""
        self._until_s[peer_id] = self._clock() + (self._avoid_s if retry_after_s is None else retry_after_s)

    def avoided(self) -> frozenset[str]:
        """The peers to avoid now."""
        now_s = self._clock()
        self._until_s = {peer: until_s for peer, until_s in self._until_s.items() if until_s > now_s}
        return frozenset(self._until_s)
