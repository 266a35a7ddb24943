"""Two that meet at a relay, and go on without it: each learns where the other one is, and both dial at once.

A router lets in what answers to something that went out. So each side uses, towards the other, the port from which it
came to the relay, which most routers then show alike to everybody; and each sends first, so that the other is let in.
One side also listens at that port: between machines of one network a dial takes less time than lies between two. Where
a router picks another port for each destination, nothing comes of it, and the relay is there as before.

Source: Ford, Srisuresh and Kegel, Peer-to-Peer Communication Across Network Address Translators (USENIX 2005), section
4; RFC 5128 section 3.4. libp2p's DCUtR succeeds for 70 % of pairs (arXiv 2510.27500).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from protocol.errors import PeerLost
from protocol.hosts import block, end_of, ip, is_global, is_loopback
from protocol.relay_frames import End, Frame, FrameReader, Kind, met

MEETING_S = 5.0  # to reach the relay, and for the other side to come there
APPROACH_S = 3.0  # in which both dial, each time that they are refused or silent
RETRY_S, RETRY_AT_MOST_S = 0.05, 0.4  # after a refusal; longer each time
READ_BYTES = 4096
BACKLOG = 4
LOWEST_PORT = 1024  # nobody dials from below

_NOT_YET = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH}
"""What a dial may meet before the other side has dialled."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Made by `meeting`.

    Attributes:
        own: the port to dial from, and its address here.
        ends: where the other side may be.
    """

    own: End
    ends: tuple[End, ...]

    async def approached(self, *, listens: bool) -> AsyncGenerator[socket.socket, None]:
        """Connections to the other side, as they come about. Whoever has one, owns it; whoever has enough ends this
        (see `contextlib.aclosing`), which ends by itself after `APPROACH_S`.

        Args:
            listens: are we the side that listens, too?
        """
        arrived: asyncio.Queue[socket.socket | None] = asyncio.Queue()
        tasks = [asyncio.ensure_future(self._dial(end, arrived)) for end in self.ends]
        if listens:
            tasks.append(asyncio.ensure_future(self._listen(arrived)))
        over = asyncio.get_running_loop().call_later(APPROACH_S, arrived.put_nowait, None)
        try:
            while (connection := await arrived.get()) is not None:
                yield connection
        finally:
            over.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while not arrived.empty():
                if (left := arrived.get_nowait()) is not None:
                    left.close()

    async def _dial(self, end: End, arrived: asyncio.Queue[socket.socket | None]) -> None:
        loop, pause_s = asyncio.get_running_loop(), RETRY_S
        while True:
            with contextlib.ExitStack() as stack:
                dialling = stack.enter_context(_bound(self.own))
                try:
                    await loop.sock_connect(dialling, end)
                except OSError as error:
                    if error.errno not in _NOT_YET:
                        return
                else:
                    stack.pop_all()
                    arrived.put_nowait(dialling)
                    return
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # else two may miss each other for ever
            pause_s = min(1.5 * pause_s, RETRY_AT_MOST_S)

    async def _listen(self, arrived: asyncio.Queue[socket.socket | None]) -> None:
        loop = asyncio.get_running_loop()
        with _bound(self.own) as listening:
            listening.listen(BACKLOG)
            while True:
                connection, _ = await loop.sock_accept(listening)
                arrived.put_nowait(connection)


@contextlib.asynccontextmanager
async def meeting(relay: End, opening: Callable[[End], Frame], *, near: bool) -> AsyncIterator[Meeting]:
    """A meeting at a relay, while the body runs: as long as that connection is there, routers keep the port.

    Args:
        opening: what to say to the relay, by where this side is as its own machine sees it.
        near: may this side dial into its own network, if the relay says that the other one is there? Else it dials
            where the relay sees the other one, and nowhere else.

    Raises:
        PeerLost: the relay refuses, its name is none, or the other side does not come.
        BadMessage: what the relay says makes no sense.
        OSError, TimeoutError: the relay does not answer.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(MEETING_S):
            found = await loop.getaddrinfo(*relay, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise PeerLost("the relay's name is none") from None
    any_host = "0.0.0.0" if found[0][0] is socket.AF_INET else "::"  # noqa: S104  # whichever leads there
    with _bound((any_host, 0)) as waiting:
        async with asyncio.timeout(MEETING_S):
            await loop.sock_connect(waiting, found[0][4])
            own = end_of(waiting.getsockname())
            await loop.sock_sendall(waiting, opening(own).encode())
            ends = await _told(waiting)
        at = str(found[0][4][0])  # not by what the relay says of anybody
        told = dict.fromkeys(ends if near else ends[:1])
        yield Meeting(own, tuple(end for end in told if is_worth_dialling(end, own, at, near=near)))


def is_worth_dialling(end: End, own: End, relay_host: str, *, near: bool) -> bool:
    """May this side dial there, because a relay says so? To the internet, as far as the relay is there; into a private
    network if the relay is in one, or, `near`, into the very one in which this side is.

    Args:
        own: where this side is by itself.
        relay_host: the relay's IP address, as it was dialled.
    """
    host, port = end
    kind, own_kind = ip(host), ip(own[0])
    if port < LOWEST_PORT or end == own or kind is None or own_kind is None or kind.version != own_kind.version:
        return False
    if is_loopback(host):
        return is_loopback(relay_host)
    return is_global(host) or not is_global(relay_host) or (near and block(host) == block(own[0]))


async def _told(connection: socket.socket) -> tuple[End, ...]:
    """Where the other one may be, once both are there; first, where the relay sees it."""
    loop, frames = asyncio.get_running_loop(), FrameReader()
    while True:
        data = await loop.sock_recv(connection, READ_BYTES)
        if not data:
            raise PeerLost("the relay ended the meeting")
        frames.feed(data)
        for frame in frames.frames():
            if frame.kind is Kind.REFUSED:
                raise PeerLost(f"the relay refuses: {frame.text[:200]}")
            return met(frame)[1]


def _bound(own: End) -> socket.socket:
    """A socket at that port, which others of ours may have, too."""
    made = socket.socket(socket.AF_INET6 if ":" in own[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):  # elsewhere the other option means that
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(own)
    except BaseException:
        made.close()
        raise
    return made
