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
from protocol.hosts import block, connection_of, end_of, seen_end
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
        self._met: dict[End, End] = {}  # by our own end of the connection to the gRPC port: where the client is

    def carries(self, end: End) -> bool:
        """Does a connection from there come from somebody whom this peer has met?"""
        return end in self._met

    def whence(self, connection: str) -> str:
        """From where a call really comes, that comes from this machine itself; both as grpc names connections."""
        end = seen_end(connection)
        return connection_of(*self._met[end]) if end in self._met else connection

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
            there = end_of(connection.getpeername())
        except OSError:  # it has ended
            connection.close()
            return
        home = block(there[0])
        if target is None or self._held.total() >= MAX_CONNECTIONS or self._held[home] >= PER_BLOCK:
            connection.close()
            return
        self._held[home] += 1
        serving = self._tasks.create_task(self._serve(connection, there, target), name="met")
        serving.add_done_callback(lambda _: self._let_go(home))

    def _let_go(self, home: str) -> None:
        self._held[home] -= 1
        self._held += Counter()  # forgets those of which there are none

    async def _serve(self, connection: socket.socket, there: End, target: End) -> None:
        """Joins a connection with this peer's own port, until it ends."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        splice = Splice(ended=lambda: None if ended.done() else ended.set_result(None))
        mine: End | None = None
        try:
            async with asyncio.timeout(DIAL_OWN_TIMEOUT_S):
                await loop.create_connection(lambda: splice.first, sock=connection)
                own, _ = await loop.create_connection(lambda: splice.second, *target)
            mine = end_of(own.get_extra_info("sockname"))
            self._met[mine] = there
            self.came += 1
            logger.info("a client comes without a relay")
            await ended
        except (OSError, TimeoutError) as error:
            logger.debug("a client that was met could not be served: %s", error)
        finally:
            splice.abort()
            if mine is not None:
                del self._met[mine]
