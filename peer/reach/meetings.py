"""Clients that a hidden peer meets at its relays, to be reached by them without these: see `protocol.meeting`."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing

from peer.reach.quota import Quota
from protocol.errors import PotluckError
from protocol.hosts import block
from protocol.meeting import meeting
from protocol.relay_frames import End, here
from protocol.splice import Splice

logger = logging.getLogger(__name__)

DIAL_OWN_TIMEOUT_S = 5.0
AT_ONCE = 8
PER_RELAY, OVERALL, WINDOW_S = 30, 60, 60.0
"""Meetings in each minute. A relay that lies could have its peers dial strangers: not often."""
MAX_CONNECTIONS, PER_BLOCK = 128, 16  # that came of meetings: in all, and with one block of addresses
PER_MEETING = 2  # one that was dialled, and one that was listened for


class Meetings:
    """Goes to meetings, and joins the connections that come of them with this peer's own gRPC port. These outlive the
    relay at which they came about, and the need for any.

    Args:
        target: this peer's own gRPC port; None: it has none at the moment.
        tasks: in which they live.
        clock: monotonic seconds.

    Attributes:
        came: connections that came about, so far.
    """

    def __init__(
        self, target: Callable[[], End | None], tasks: asyncio.TaskGroup, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.came = 0
        self._target = target
        self._tasks = tasks
        self._clock = clock
        self._quota = Quota(PER_RELAY, OVERALL, WINDOW_S)
        self._under_way = 0
        self._held: Counter[str] = Counter()  # connections, by block
        self._splices: dict[Splice, End] = {}  # with our own end of the connection to the gRPC port

    def carries(self, end: End) -> bool:
        """Does a connection from there come from somebody whom this peer has met?"""
        return end in self._splices.values()

    def sought(self, relay_id: str, relay: End, token: bytes) -> None:
        """A client wants to meet this peer at that relay. Where there are too many, none of them is told: it stays with
        the relay."""
        if self._under_way >= AT_ONCE or self._quota.admit(relay_id, self._clock()):
            return
        self._under_way += 1
        meeting_there = self._tasks.create_task(self._meet(relay, token), name="meeting")
        meeting_there.add_done_callback(lambda _: self._ended())

    def _ended(self) -> None:
        self._under_way -= 1

    async def _meet(self, relay: End, token: bytes) -> None:
        try:
            async with (
                meeting(relay, lambda own: here(token, own), near=False) as found,
                aclosing(found.approached(listens=True)) as connections,
            ):
                came = 0
                async for connection in connections:
                    came += 1
                    self._hold(connection)
                    if came == PER_MEETING:
                        break
        except (OSError, TimeoutError, PotluckError) as error:
            logger.debug("a client that sought this peer was not met: %s", error)

    def _hold(self, connection: socket.socket) -> None:
        """Serves a connection, if there may be another one."""
        target = self._target()
        try:
            there = block(connection.getpeername()[0])
        except OSError:  # it has ended
            target = None
        if target is None or self._held.total() >= MAX_CONNECTIONS or self._held[there] >= PER_BLOCK:
            connection.close()
            return
        self._held[there] += 1
        serving = self._tasks.create_task(self._serve(connection, target), name="met")
        serving.add_done_callback(lambda _: self._let_go(there))

    def _let_go(self, there: str) -> None:
        self._held[there] -= 1
        self._held += Counter()  # forgets those of which there are none

    async def _serve(self, connection: socket.socket, target: End) -> None:
        """Joins a connection with this peer's own port, until it ends."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        splice = Splice(ended=lambda: None if ended.done() else ended.set_result(None))
        try:
            async with asyncio.timeout(DIAL_OWN_TIMEOUT_S):
                await loop.create_connection(lambda: splice.first, sock=connection)
                own, _ = await loop.create_connection(lambda: splice.second, *target)
            name = own.get_extra_info("sockname")
            self._splices[splice] = str(name[0]), int(name[1])
            self.came += 1
            logger.info("a client comes without a relay")
            await ended
        except (OSError, TimeoutError) as error:
            logger.debug("a client that was met could not be served: %s", error)
        finally:
            splice.abort()
            self._splices.pop(splice, None)
