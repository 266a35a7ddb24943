"""Channels reach the holder of the pinned certificate, and fail at once, as a lost peer, with anyone else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from protocol import channel as module
from protocol.channel import (
    connected,
    open_channel,
    peer_error,
    server_credentials,
    server_options,
    why_unreachable,
)
from protocol.errors import BadMessage, BadRecord, PeerFault, PeerFull, PeerLost
from protocol.identity import Identity

LIMIT = 64 << 10
TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.ephemeral()


@pytest.fixture(scope="module")
def other() -> Identity:
    return Identity.ephemeral()


async def echo(request: bytes, context: object) -> bytes:
    return request


async def echo_stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@contextlib.asynccontextmanager
async def serving(identity: Identity | None, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server; without an identity one that speaks no TLS. Gives its port."""
    server = grpc.aio.server(options=server_options(LIMIT))
    handlers = {
        "echo": grpc.unary_unary_rpc_method_handler(echo),
        "stream": grpc.stream_stream_rpc_method_handler(echo_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    if identity is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        port = server.add_secure_port(f"{host}:0", server_credentials(identity))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def call(address: str, certificate: bytes, request: bytes = b"hello") -> bytes:
    async with open_channel(address, certificate, max_message_bytes=LIMIT) as channel:
        return bytes(await channel.unary_unary("/Test/echo")(request, timeout=TIMEOUT_S))


async def failure(address: str, certificate: bytes, request: bytes = b"hello") -> Exception:
    started = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(address, certificate, request)
    assert time.monotonic() - started < TIMEOUT_S / 2, "it waited for the deadline"
    return peer_error(caught.value, "Qm")


async def test_the_pinned_peer_answers(identity: Identity) -> None:
    async with serving(identity) as port:
        assert await call(f"127.0.0.1:{port}", identity.certificate_der) == b"hello"
        assert await call(f"localhost:{port}", identity.certificate_der) == b"hello"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
async def test_ipv6(identity: Identity) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback")
    async with serving(identity, "[::1]") as port:
        assert await call(f"[::1]:{port}", identity.certificate_der) == b"hello"


async def test_another_certificate_is_a_lost_peer(identity: Identity, other: Identity) -> None:
    async with serving(identity) as port:
        error = await failure(f"127.0.0.1:{port}", other.certificate_der)
    assert isinstance(error, PeerLost) and error.retryable and error.peer_id == "Qm"
    assert "another certificate is shown than its record names" in error.message


async def test_another_certificate_of_the_same_name_is_a_lost_peer(tmp_path: object, identity: Identity) -> None:
    with identity.key_file() as key_path:
        impostor = Identity.load_or_create(key_path.parent)
    assert impostor.peer_id == identity.peer_id and impostor.certificate_der != identity.certificate_der
    async with serving(impostor) as port:
        error = await failure(f"127.0.0.1:{port}", identity.certificate_der)
        assert isinstance(error, PeerLost) and "another certificate is shown" in error.message
        channel = open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT)
        assert not await connected(channel, TIMEOUT_S)
        assert "another certificate is shown" in await why_unreachable(channel, TIMEOUT_S)
        await channel.close()


async def test_a_server_without_tls_is_a_lost_peer(identity: Identity) -> None:
    async with serving(None) as port:
        error = await failure(f"127.0.0.1:{port}", identity.certificate_der)
    assert isinstance(error, PeerLost) and "speaks no TLS" in error.message


async def test_an_expired_certificate_is_a_lost_peer(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.identity.CERTIFICATE_DAYS", -0.5)
    with identity.key_file() as key_path:
        late = Identity.load_or_create(key_path.parent)
    async with serving(late) as port:
        error = await failure(f"127.0.0.1:{port}", late.certificate_der)
    assert isinstance(error, PeerLost) and "has expired" in error.message


async def test_nobody_there_is_a_lost_peer(identity: Identity) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    error = await failure(f"127.0.0.1:{port}", identity.certificate_der)
    assert isinstance(error, PeerLost) and "nothing listens" in error.message


async def test_a_message_over_the_limit_is_not_sent(identity: Identity) -> None:
    async with serving(identity) as port:
        error = await failure(f"127.0.0.1:{port}", identity.certificate_der, b"x" * (LIMIT + 1))
    assert isinstance(error, BadMessage) and not error.retryable


async def test_proxies_of_the_environment_are_not_used(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with serving(identity) as port:
        assert await call(f"127.0.0.1:{port}", identity.certificate_der) == b"hello"


async def test_a_server_that_comes_back_is_reached_again(identity: Identity) -> None:
    async with serving(identity) as port:
        channel = open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT)
        assert await channel.unary_unary("/Test/echo")(b"1", timeout=TIMEOUT_S) == b"1"
    server = grpc.aio.server(options=server_options(LIMIT))
    handlers = {"echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", handlers),))
    assert server.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity)) == port
    await server.start()
    assert await channel.unary_unary("/Test/echo")(b"2", timeout=TIMEOUT_S, wait_for_ready=True) == b"2"
    await channel.close()
    await server.stop(0)


async def test_a_second_server_on_the_port_is_refused(identity: Identity) -> None:
    async with serving(identity) as port:
        second = grpc.aio.server(options=server_options(LIMIT))
        with pytest.raises(RuntimeError):
            second.add_secure_port(f"127.0.0.1:{port}", server_credentials(identity))


async def test_a_silent_network_is_noticed_without_a_deadline(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEPALIVE_EVERY_MS", 200)
    monkeypatch.setattr(module, "KEEPALIVE_TIMEOUT_MS", 200)
    monkeypatch.setattr(module, "MIN_PING_GAP_MS", 100)
    async with (
        serving(identity) as port,
        black_hole(port) as (hole, frozen),
        open_channel(f"127.0.0.1:{hole}", identity.certificate_der, max_message_bytes=LIMIT) as channel,
    ):
        stream = channel.stream_stream("/Test/stream")()
        await stream.write(b"1")
        assert await stream.read() == b"1"
        frozen.set()
        await stream.write(b"2")
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
        assert isinstance(peer_error(caught.value), PeerLost)


@contextlib.asynccontextmanager
async def black_hole(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A relay to `port` that, once the event is set, keeps its connections and carries nothing."""
    frozen = asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if frozen.is_set():
                await asyncio.Event().wait()
            writer.write(data)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        pumps = asyncio.gather(pump(reader, back), pump(there, writer))
        relays.append(pumps)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await pumps
        for end in (writer, back):
            end.close()

    relays: list[asyncio.Future[list[None]]] = []
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], frozen
    finally:
        for pumps in relays:
            pumps.cancel()
        server.close()


def test_a_bad_certificate_is_a_bad_record() -> None:
    with pytest.raises(BadRecord):
        open_channel("127.0.0.1:1", b"no certificate", max_message_bytes=LIMIT)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "", PeerLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", PeerLost),
        (grpc.StatusCode.CANCELLED, "", PeerLost),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory", PeerFull),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (2 vs. 1)", BadMessage),
        (grpc.StatusCode.INTERNAL, "", PeerFault),
        (grpc.StatusCode.UNIMPLEMENTED, "", BadMessage),
    ],
)
def test_what_a_status_means(code: grpc.StatusCode, details: str, expected: type[Exception]) -> None:
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    assert type(peer_error(error)) is expected
