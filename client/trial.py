"""One step's tries: for how long it may fail, and what was tried already, so that nothing is tried for ever."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from protocol.errors import PotluckError

RETRY_PAUSE_S = 0.25  # between two looks for a chain


class Patience:
    """How long one step may fail before it is given up.

    Args:
        wait_s: seconds from the first failure on; failures that are further apart have nothing to do with each other.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._until_s: float | None = None
        self._last_s = 0.0

    async def after(self, failure: PotluckError, *, pause: bool = True) -> None:
        """Returns at once after the first failure, after a pause after later ones; raises `failure` in the end.

        Args:
            pause: false where something else can be tried at once.
        """
        now_s = asyncio.get_running_loop().time()
        is_first = self._until_s is None or now_s - self._last_s > self._wait_s > 0
        self._last_s = now_s
        if self._until_s is None or is_first:
            self._until_s = now_s + self._wait_s
            return
        if now_s >= self._until_s:
            raise failure
        if pause:
            await asyncio.sleep(RETRY_PAUSE_S)


@dataclass(slots=True)
class Trial:
    """What one step has been through.

    Attributes:
        resumed: session ids of the hops that were taken up again: the second loss is final.
        lost: ids of peers that failed in this step: chosen again only where nobody else is left.
        forgot: ids of peers that had lost the session: the second time it is a fault.
        exhausted: all peers have been tried: time to look for others, and to wait.
        nonsense: how often a peer called what it was sent nonsense: twice is the sender's fault.
        disturbed: its time says nothing of the times to come.
        mended: a peer, or an edge between two, was found to fail in it.
    """

    patience: Patience
    resumed: set[bytes] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    forgot: set[str] = field(default_factory=set)
    exhausted: bool = False
    nonsense: int = 0
    disturbed: bool = False
    mended: bool = False

    async def again(self, failure: PotluckError) -> None:
        """Returns when the next try may begin; raises `failure` if it has gone on for too long."""
        pause, self.exhausted = self.exhausted, False
        await self.patience.after(failure, pause=pause)
