"""A way to a hidden peer that goes round its relay: a connection that both made at once, behind a port of this machine.

gRPC wants to dial by itself. So it dials a port that is open for this one connection, which is joined there with the
one that was met; TLS and the pinned certificate go through from end to end, as through a relay.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from contextlib import aclosing

from protocol.errors import PeerLost, PotluckError
from protocol.hosts import address, host_of
from protocol.identity import common_name, load_certificate
from protocol.meeting import meeting
from protocol.relay_frames import End, seek
from protocol.splice import Splice

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"


class Bypass:
    """Made by `find_bypass`.

    Attributes:
        address: to dial, once.
    """

    def __init__(self) -> None:
        self.address = ""
        self._splice = Splice()
        self._server: asyncio.Server | None = None
        self._is_taken = False

    @property
    def is_over(self) -> bool:
        """Has the connection ended?"""
        return self._splice.is_over

    async def open(self, connection: socket.socket) -> None:
        """Puts a connection behind the port; for `find_bypass`."""
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self._splice.second, sock=connection)
            self._server = await loop.create_server(self._take, HOST, 0)
        except BaseException:
            self._splice.abort()
            raise
        self.address = address(*self._server.sockets[0].getsockname()[:2])

    def close(self) -> None:
        """Ends the connection at once."""
        if self._server is not None:
            self._server.close()
        self._splice.abort()

    def _take(self) -> asyncio.Protocol:
        assert self._server is not None
        if self._is_taken:
            return _TooLate()
        self._is_taken = True
        asyncio.get_running_loop().call_soon(self._server.close)  # uvloop must not lose it in the middle of this
        return self._splice.first


class _TooLate(asyncio.Protocol):
    """Whoever dials a second time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def find_bypass(relays: Iterable[str], certificate_der: bytes) -> Bypass:
    """A way to the peer that has this certificate, which it is tied to these relays to be met by. Tries one relay after
    the other. Whether it is that peer, whoever dials must see by the certificate.

    Raises:
        PeerLost: there is no such way.
    """
    name = common_name(load_certificate(certificate_der))
    why: object = "it has no relay"
    for relay in relays:
        bypass = Bypass()
        try:
            async with (
                meeting(_end(relay), lambda _: seek(name), near=True) as found,
                aclosing(found.approached(listens=False)) as connections,
            ):
                async for connection in connections:
                    await bypass.open(connection)
                    break
        except (OSError, TimeoutError, PotluckError) as error:
            bypass.close()
            why = error or type(error).__name__
            continue
        except BaseException:
            bypass.close()
            raise
        if bypass.address:
            return bypass
        why = "no dial got through"
    raise PeerLost(f"there is no way to the peer but through its relay: {why}")


def _end(relay: str) -> End:
    """Where a relay is, by its address in a record."""
    return host_of(relay), int(relay.rpartition(":")[2])
