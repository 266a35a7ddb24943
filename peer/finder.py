"""Finds the verified records of peers that others name, without searching the swarm each time somebody does."""

from __future__ import annotations

import asyncio
import logging
import time

from dht.record import PeerRecord
from dht.view import SwarmReader
from protocol.errors import SwarmNotFound

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 0.2  # between two looks: clients can name peers that do not exist


class Finder:
    """Finds them in this peer's view of the swarm, or in a fresh one where that is of no use."""

    def __init__(self, reader: SwarmReader) -> None:
        self._reader = reader
        self._looking = asyncio.Lock()
        self._begun = 0  # looks so far

    async def find(self, peer_id: str, useless: PeerRecord | None = None) -> PeerRecord | None:
        """A peer's record; None: the swarm has none. Looks again if that in the view is missing or `useless`.

        All who ask before a look begins share it, however many peers they name.
        """
        if self._reader.view.peer(peer_id) in (None, useless):
            begun = self._begun
            async with self._looking:
                if self._begun == begun:
                    await self._look()
        return self._reader.view.peer(peer_id)

    async def _look(self) -> None:
        await asyncio.sleep(max(0.0, LOOK_AGAIN_S - abs(time.time() - self._reader.view.as_of)))
        self._begun += 1
        try:
            await self._reader.refresh()
        except SwarmNotFound as error:
            logger.warning("%s", error)
