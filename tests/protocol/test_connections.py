"""What connections may cost a server: strangers that say nothing, too little or too much are closed or refused."""

from __future__ import annotations

import asyncio
import resource
import time

import grpc
import grpc.aio
import pytest

from protocol import channel as module
from protocol import descriptors
from protocol.channel import open_channel
from protocol.descriptors import connections_at_most, raise_limit
from protocol.identity import Identity
from protocol.limits import MAX_CONNECTIONS, METADATA_BYTES
from tests.protocol.test_channel import LIMIT, TIMEOUT_S, call, serving

HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the beginning of TLS


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.ephemeral()


async def closed_after(port: int, first: bytes, every_s: float) -> float:
    """Seconds until the server closed a connection on which bytes came one by one."""
    started_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ended = asyncio.ensure_future(reader.read())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for byte in first + bytes(1000):
                await asyncio.wait({ended}, timeout=every_s)
                if ended.done():
                    break
                writer.write(bytes((byte,)))
    finally:
        ended.cancel()
        writer.close()
    return time.monotonic() - started_s


async def test_a_handshake_has_its_time(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_S", 0.3)
    async with serving(identity) as port:
        silent, slow = await asyncio.gather(closed_after(port, b"", 1.0), closed_after(port, HELLO, 0.05))
        assert 0.2 < silent < 3 and 0.2 < slow < 3
        assert await call(f"127.0.0.1:{port}", identity.certificate_der) == b"hello"


async def test_an_idle_connection_ends_and_is_made_anew(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECTION_IDLE_S", 0.2)
    async with (
        serving(identity) as port,
        open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT) as channel,
    ):
        echo = channel.unary_unary("/Test/echo")
        assert await echo(b"hello", timeout=TIMEOUT_S) == b"hello"
        async with asyncio.timeout(TIMEOUT_S):
            while (state := channel.get_state()) is not grpc.ChannelConnectivity.IDLE:
                await channel.wait_for_state_change(state)
        assert await echo(b"hello", timeout=TIMEOUT_S) == b"hello"


async def test_connections_over_the_cap_are_closed_at_once(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "connections_at_most", lambda: 5)
    async with serving(identity) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(TIMEOUT_S):
            assert await reader.read() == b""
        for _, other in [*held, (reader, writer)]:
            other.close()
        async with open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT) as channel:
            echo = channel.unary_unary("/Test/echo")
            assert await echo(b"hello", timeout=TIMEOUT_S, wait_for_ready=True) == b"hello"


async def test_large_headers_are_refused(identity: Identity) -> None:
    async with (
        serving(identity) as port,
        open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT) as channel,
    ):
        echo = channel.unary_unary("/Test/echo")
        assert await echo(b"", timeout=TIMEOUT_S, metadata=[("a", "a" * (METADATA_BYTES // 2))]) == b""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await echo(b"", timeout=TIMEOUT_S, metadata=[("a", "a" * (METADATA_BYTES + 1))])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_calls_over_one_connection_wait_for_each_other(
    identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STREAMS_PER_CONNECTION", 2)
    async with (
        serving(identity) as port,
        open_channel(f"127.0.0.1:{port}", identity.certificate_der, max_message_bytes=LIMIT) as channel,
    ):
        streams = [channel.stream_stream("/Test/stream")(timeout=TIMEOUT_S) for _ in range(2)]
        for stream in streams:
            await stream.write(b"hello")
            assert await stream.read() == b"hello"
        third = asyncio.ensure_future(channel.unary_unary("/Test/echo")(b"third", timeout=TIMEOUT_S))
        await asyncio.wait({third}, timeout=0.2)
        assert not third.done()
        await streams[0].done_writing()
        assert await third == b"third"
        streams[1].cancel()


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lower = min(soft, hard, 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lower, hard))
    try:
        assert connections_at_most() == int(descriptors.SHARE * lower)
        wanted = lower + 1 if hard == resource.RLIM_INFINITY or hard > lower else lower
        monkeypatch.setattr(descriptors, "WANTED", wanted)
        assert raise_limit() == wanted == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        monkeypatch.setattr(descriptors, "WANTED", 1)
        assert raise_limit() == wanted, "it is never lowered"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert connections_at_most() <= MAX_CONNECTIONS
