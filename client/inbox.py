"""What hops say to one session, until it listens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import PotluckError
from protocol.limits import PAYLOAD_BYTES
from protocol.messages import Notice, StepResult

if TYPE_CHECKING:
    from client.hop import Hop

MAX_HEARD = 1024  # things that wait to be heard by one session
MAX_HEARD_BYTES = PAYLOAD_BYTES  # of results among them


@dataclass(frozen=True, slots=True)
class Heard:
    """What came from a hop, beside the answer to `attach`."""

    hop: Hop
    what: StepResult | Notice | PotluckError

    @property
    def nbytes(self) -> int:
        """What it holds of memory, roughly."""
        return len(self.what.step.payload) if isinstance(self.what, StepResult) else 0


class Inbox(asyncio.Queue[Heard]):
    """What hops say to one session, until it listens."""

    def __init__(self) -> None:
        super().__init__()
        self._nbytes = 0

    def hear(self, heard: Heard) -> None:
        """Keeps it, unless the session is being flooded; what it then lacks it will ask for."""
        fits = self.empty() or self._nbytes + heard.nbytes <= MAX_HEARD_BYTES
        if fits and self.qsize() < MAX_HEARD:
            self.put_nowait(heard)

    def clear(self) -> None:
        """Forgets all of it."""
        while not self.empty():
            self.get_nowait()

    def _put(self, item: Heard) -> None:
        self._nbytes += item.nbytes
        super()._put(item)

    def _get(self) -> Heard:
        item = super()._get()
        self._nbytes -= item.nbytes
        return item
