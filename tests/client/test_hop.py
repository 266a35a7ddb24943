"""One hop's stream, to a peer that does not keep to the protocol."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from client import inbox as module
from client.chain import Link
from client.hop import Hop
from client.inbox import Heard, Inbox
from dht.record import PeerRecord
from protocol.channel import server_credentials
from protocol.errors import PeerLost
from protocol.limits import WIRE_VERSION
from protocol.messages import Open, Opened, Route, Step, StepResult
from protocol.span import Span
from tests.harness import KnownPeers, identity

NONSENSE = b"\xff" * 9
OPENED = Opened(0, 0, 100, "float32").to_proto().SerializeToString()
SPAN = Span(0, 2)
OPENING = Open(secrets.token_bytes(16), 1, "f", SPAN, "none", 1, 8)
TIMEOUT_S = 20.0  # far more than an answer takes: who waits for it to pass has not understood


@asynccontextmanager
async def hop_to(*answers: bytes) -> AsyncIterator[tuple[Hop, Inbox]]:
    """A hop to a peer that answers the first messages of a session, and each question for progress, with these bytes
    in turn."""
    said = iter(answers)

    async def infer(requests: AsyncIterator[bytes], context: Any) -> None:
        async for _ in requests:
            await context.write(next(said))

    async def progress(request: bytes, context: Any) -> bytes:
        return next(said)

    who, server = identity(8), grpc.aio.server()
    methods = {
        "Infer": grpc.stream_stream_rpc_method_handler(infer),
        "Progress": grpc.unary_unary_rpc_method_handler(progress),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("potluck.Peer", methods),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(who))
    await server.start()
    record = PeerRecord(
        peer_id=who.peer_id,
        fingerprint="f",
        n_blocks=2,
        span=SPAN,
        state="online",
        addresses=(f"127.0.0.1:{port}",),
        certificate_der=who.certificate_der,
        codecs=("none",),
        wire_version=WIRE_VERSION,
    )
    known, inbox = KnownPeers([record]), Inbox()
    hop = Hop(Link(record, SPAN), known.channel(record), secrets.token_bytes(16), inbox)
    try:
        yield hop, inbox
    finally:
        hop.abandon()
        await known.close()
        await server.stop(None)


async def test_nonsense_instead_of_an_answer() -> None:
    async with hop_to(NONSENSE) as (hop, _):
        with pytest.raises(PeerLost, match="nonsense") as caught:
            await asyncio.wait_for(hop.attach(OPENING, TIMEOUT_S, TIMEOUT_S), TIMEOUT_S / 2)
        assert caught.value.peer_id == hop.link.peer.peer_id


async def test_nonsense_in_the_midst_of_a_session() -> None:
    async with hop_to(OPENED, NONSENSE) as (hop, inbox):
        assert await hop.attach(OPENING, TIMEOUT_S, TIMEOUT_S) == Opened(0, 0, 100, "float32")
        hop.route(Route(1, 0))
        heard = await asyncio.wait_for(inbox.get(), TIMEOUT_S / 2)
        assert isinstance(heard.what, PeerLost)
        assert "nonsense" in heard.what.message


async def test_nonsense_about_progress() -> None:
    async with hop_to(NONSENSE) as (hop, _):
        assert isinstance(await hop.progress(TIMEOUT_S), PeerLost)


def heard(hop: Hop, nbytes: int) -> Heard:
    return Heard(hop, StepResult(Step(1, 0, 0, (), bytes(nbytes))))


async def test_what_nobody_listens_to_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEARD_BYTES", 100)
    async with hop_to(OPENED) as (hop, inbox):
        inbox.hear(heard(hop, 1000))  # one is always kept, however large
        inbox.hear(heard(hop, 1))
        assert inbox.qsize() == 1
        inbox.get_nowait()
        for _ in range(5):
            inbox.hear(heard(hop, 40))
        inbox.hear(Heard(hop, PeerLost("gone")))
        assert [one.nbytes for one in (inbox.get_nowait(), inbox.get_nowait(), inbox.get_nowait())] == [40, 40, 0]
        for _ in range(2 * module.MAX_HEARD):
            inbox.hear(Heard(hop, PeerLost("gone")))
        assert inbox.qsize() == module.MAX_HEARD
