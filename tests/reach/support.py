"""What tests of reachability share."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable

import grpc.aio

from peer.reach.dialback import DialBacks
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import server_credentials, server_options
from protocol.errors import PotluckError
from protocol.limits import MESSAGE_BYTES
from tests.harness import identity

DialBack = Callable[[pb.DialBackRequest], pb.DialBackReply]


def hello_of(name: str) -> bytes:
    """What OpenSSL says first."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


class Peer(pb_grpc.PeerServicer):
    """A peer that does nothing but answer pings and dial back.

    Args:
        lie: what it says instead of dialling back.
    """

    def __init__(self, lie: DialBack | None) -> None:
        self.dial_backs = DialBacks()
        self._lie = lie

    async def Ping(self, request: pb.PingRequest, context: grpc.aio.ServicerContext) -> pb.PingReply:  # noqa: N802
        return pb.PingReply(payload=request.payload)

    async def DialBack(  # noqa: N802
        self, request: pb.DialBackRequest, context: grpc.aio.ServicerContext
    ) -> pb.DialBackReply:
        if self._lie is not None:
            return self._lie(request)
        try:
            return await self.dial_backs.answer(request, context.peer())
        except PotluckError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            raise


@contextlib.asynccontextmanager
async def answering(index: int, lie: DialBack | None = None) -> AsyncIterator[int]:
    """Such a peer, with identity number `index`. Gives its port."""
    server = grpc.aio.server(options=server_options(MESSAGE_BYTES))
    pb_grpc.add_PeerServicer_to_server(Peer(lie), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity(index)))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)
