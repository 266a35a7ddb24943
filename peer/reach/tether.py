"""A peer's tie to a relay: the connection that it keeps, and those with which it comes for clients.

`Tether.run` keeps it until the relay is lost or refuses. For each client it dials the relay once more and joins that
connection with this machine's own gRPC port, where it is one connection among others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import cast

from dht.background import task_group
from protocol.errors import PeerFull, PeerLost, PotluckError, WireError
from protocol.hosts import end_of
from protocol.identity import Identity
from protocol.relay_frames import End, Frame, FrameReader, Kind, proof
from protocol.splice import Splice

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
REGISTER_TIMEOUT_S = 5.0
PING_EVERY_S = 15.0
"""Routers forget a connection on which nothing moves, the strictest of them after a minute or less."""
SILENT_S = 35.0  # without a word of the relay: it is lost
MAX_CALLS = 128
READ_BYTES = 4096


class Tether:
    """To one relay.

    Args:
        relay_id: the relay's peer id.
        ends: where the relay listens, tried in this order: host, port.
        target: this peer's own gRPC port; None: it has none at the moment.
        sought: told that a client wants to meet this peer at that relay: where the relay is, and the token.

    Attributes:
        welcome: done with the host that the relay sees us as, once it serves us; fails if it does not.
        end: the address of the relay that answered; `peer_host`: its IP address.
        holds: does the relay serve us now?
    """

    def __init__(
        self,
        identity: Identity,
        relay_id: str,
        ends: tuple[End, ...],
        target: Callable[[], End | None],
        sought: Callable[[End, bytes], None] = lambda relay, token: None,
    ) -> None:
        self.relay_id = relay_id
        self.end: End | None = None
        self.peer_host = ""
        self.welcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.welcome.add_done_callback(_seen)
        self._identity = identity
        self._ends = ends
        self._target = target
        self._sought = sought
        self._calls: set[asyncio.Task[None]] = set()
        self._splices: dict[Splice, End] = {}  # with our own end of the connection to the gRPC port

    @property
    def holds(self) -> bool:
        return self.welcome.done() and not self.welcome.cancelled() and self.welcome.exception() is None

    def carries(self, end: End) -> bool:
        """Does a connection from there come through this tether?"""
        return end in self._splices.values()

    async def run(self) -> None:
        """Registers, and comes for clients, until the relay is lost.

        Raises:
            PeerLost: it was, or could not be reached.
            PeerFull: it refuses.
        """
        try:
            reader, writer = await self._connect()
            try:
                await self._serve(reader, writer)
            finally:
                writer.transport.abort()  # a relay that reads nothing would keep it open for ever
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        except WireError as error:
            raise self._lost(PeerLost(f"the relay does not speak as relays do: {error.message}")) from None
        except (OSError, EOFError, TimeoutError) as error:
            raise self._lost(PeerLost(f"the relay is lost: {str(error) or type(error).__name__}")) from None
        except PotluckError as error:
            raise self._lost(error) from None
        finally:
            self.welcome.cancel()
            for splice in list(self._splices):
                splice.close()

    def _lost(self, error: PotluckError) -> PotluckError:
        error.peer_id = self.relay_id
        if not self.welcome.done():
            self.welcome.set_exception(error)
        return error

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        last: Exception = PeerLost("the relay has no address")
        for end in self._ends:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    streams = await asyncio.open_connection(*end)
            except (OSError, TimeoutError) as error:
                last = error
                continue
            except UnicodeError:
                last = PeerLost("the relay's name is none")
                continue
            seen = streams[1].get_extra_info("peername")
            if seen is None:  # it was gone before it could be asked for
                last = ConnectionResetError("it ended the connection")
                streams[1].transport.abort()
                continue
            self.end = end
            self.peer_host = end_of(seen)[0]
            return streams
        raise last

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = FrameReader()

        async def heard() -> list[Frame]:
            data = await reader.read(READ_BYTES)
            if not data:
                raise EOFError("it ended the connection")
            frames.feed(data)
            return list(frames.frames())

        came: list[Frame] = []
        writer.write(Frame(Kind.REGISTER).encode())
        async with asyncio.timeout(REGISTER_TIMEOUT_S):
            while not self.welcome.done():
                came = await heard()
                while came and not self.welcome.done():
                    await self._enter(came.pop(0), writer)
        async with task_group() as tasks:
            pinging = tasks.create_task(self._ping(writer), name="relay-ping")
            try:
                while True:
                    for frame in came:
                        if frame.kind is Kind.DIAL:
                            self._call(frame.body, tasks)
                        elif frame.kind is Kind.SOUGHT and self.end is not None:
                            self._sought(self.end, frame.body)
                    async with asyncio.timeout(SILENT_S):
                        came = await heard()
            finally:
                pinging.cancel()

    async def _enter(self, frame: Frame, writer: asyncio.StreamWriter) -> None:
        if frame.kind is Kind.CHALLENGE:
            writer.write((await asyncio.to_thread(proof, self._identity, self.relay_id, frame.body)).encode())
        elif frame.kind is Kind.WELCOME:
            self.welcome.set_result(frame.text)
        elif frame.kind is Kind.REFUSED:
            raise PeerFull(f"the relay refuses: {frame.text[:200]}")

    async def _ping(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(PING_EVERY_S)
            writer.write(Frame(Kind.PING).encode())

    def _call(self, token: bytes, tasks: asyncio.TaskGroup) -> None:
        target = self._target()
        if target is None or len(self._calls) >= MAX_CALLS:
            return  # the client hears of it from the relay, which waits in vain
        call = tasks.create_task(self._come(token, target), name="relay-call")
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _come(self, token: bytes, target: End) -> None:
        """Dials the relay for a client, and joins that with this peer's own port."""
        assert self.end is not None
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        splice = Splice(ended=lambda: None if ended.done() else ended.set_result(None))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                own, _ = await loop.create_connection(lambda: splice.second, *target)
                self._splices[splice] = end_of(own.get_extra_info("sockname"))
                await loop.create_connection(lambda: _Announced(splice, token), *self.end)
            await ended
        except (OSError, TimeoutError) as error:
            logger.debug("a client that came through a relay could not be served: %s", error)
        finally:
            splice.abort()
            self._splices.pop(splice, None)


class _Announced(asyncio.Protocol):
    """The connection to the relay, which begins with the token."""

    def __init__(self, splice: Splice, token: bytes) -> None:
        self._splice = splice
        self._token = token

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast("asyncio.Transport", transport)
        connection.write(Frame(Kind.DATA, self._token).encode())
        self._splice.first.adopt(connection, b"")


def _seen(welcome: asyncio.Future[str]) -> None:
    """Nobody may be waiting for a refusal any more; asyncio would complain."""
    if not welcome.cancelled():
        welcome.exception()
