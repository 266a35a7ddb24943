"""A peer that is reached through a relay, with real gRPC and TLS on loopback: carried, limited, and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from urllib.request import urlopen

import grpc
import grpc.aio
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peer.config import PeerConfig
from peer.host import Served
from peer.metrics import serving_metrics
from peer.reach.relay import Relay, RelaySettings, open_relay
from peer.reach.switchboard import RelayLimits
from peer.reach.tether import MAX_CALLS, Tether
from peer.standing import Standing
from protocol.channel import connected, open_channel, server_credentials, server_options
from protocol.errors import PeerFull, PeerLost
from protocol.identity import Identity, certificate_name
from protocol.loop import new_event_loop
from protocol.relay_frames import NONCE_BYTES, TOKEN_BYTES, Frame, Kind, proof
from protocol.span import Span
from tests.harness import identity
from tests.reach.support import hello_of

Saying = tuple[bytes, float]
"""What a stranger says, and for how many seconds it pauses between two bytes."""

LIMIT = 1 << 20
TIMEOUT_S = 10.0


async def echo(request: bytes, context: object) -> bytes:
    return request


@contextlib.asynccontextmanager
async def serving(me: Identity) -> AsyncIterator[int]:
    server = grpc.aio.server(options=server_options(LIMIT))
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Test", {"echo": handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(me))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@dataclass
class Place:
    """A relay, and a peer that is tied to it."""

    relay: Relay
    tether: Tether
    provider: Identity
    target: tuple[str, int]
    task: asyncio.Task[None]

    def channel(self, me: Identity | None = None) -> grpc.aio.Channel:
        me = me or self.provider
        return open_channel(f"127.0.0.1:{self.relay.port}", me.certificate_der, max_message_bytes=LIMIT)

    async def ask(self, channel: grpc.aio.Channel, payload: bytes = b"hello") -> bytes:
        answer: bytes = await channel.unary_unary("/Test/echo")(payload, timeout=TIMEOUT_S)
        return answer


@contextlib.asynccontextmanager
async def tied(limits: RelayLimits | None = None, mbit_per_s: float = 1e5) -> AsyncIterator[Place]:
    relay_identity, provider = identity(0), identity(1)
    settings = RelaySettings("127.0.0.1", 0, mbit_per_s, limits=limits or RelayLimits())
    async with serving(provider) as port, open_relay(relay_identity.peer_id, settings) as relay:
        tether = Tether(provider, relay_identity.peer_id, (("127.0.0.1", relay.port),), lambda: place.target)
        task = asyncio.create_task(tether.run())
        place = Place(relay, tether, provider, ("127.0.0.1", port), task)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                assert await tether.welcome == "127.0.0.1"
            yield place
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, PeerLost):
                await task


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def carries_both_ways() -> None:
    async with tied() as place:
        channel = place.channel()
        payload = os.urandom(LIMIT - 1000)
        for _ in range(8):
            assert await place.ask(channel, payload) == payload
        assert place.relay.carried_bytes > 16 * len(payload), "all of it went through the relay"
        assert place.relay.board.calls == 1
        await channel.close()
        await until(lambda: place.relay.board.calls == 0)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, new_event_loop])
def test_calls_go_through_a_relay(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(carries_both_ways())


async def test_a_peer_that_is_not_registered_is_not_reached() -> None:
    async with tied() as place:
        channel = place.channel(identity(2))
        assert not await connected(channel, 2.0)
        await channel.close()


async def test_the_certificate_is_pinned_from_end_to_end() -> None:
    """Whoever registers under a name must still have its certificate: a relay that lies is found out."""
    liar = identity(2)
    async with serving(liar) as port:
        own = identity(1)
        settings = RelaySettings("127.0.0.1", 0, 1e5, own=lambda: ("127.0.0.1", port))
        async with open_relay(own.peer_id, settings) as relay:
            channel = open_channel(f"127.0.0.1:{relay.port}", own.certificate_der, max_message_bytes=LIMIT)
            assert not await connected(channel, 2.0)
            assert relay.carried_bytes > 0, "it was carried to somebody else"
            await channel.close()


async def test_a_relay_is_reached_as_itself_too() -> None:
    me = identity(0)
    async with serving(me) as port:
        settings = RelaySettings("127.0.0.1", 0, 1e5, own=lambda: ("127.0.0.1", port))
        async with open_relay(me.peer_id, settings) as relay:
            channel = open_channel(f"127.0.0.1:{relay.port}", me.certificate_der, max_message_bytes=LIMIT)
            assert await connected(channel, TIMEOUT_S)
            assert await channel.unary_unary("/Test/echo")(b"x", timeout=TIMEOUT_S) == b"x"
            await channel.close()


async def test_the_rate_is_kept() -> None:
    async with tied(mbit_per_s=80.0) as place:  # 10 MB/s, and 2.5 MB at once
        channel, payload = place.channel(), bytes(LIMIT - 1000)
        await place.ask(channel)
        started_s = time.monotonic()
        for _ in range(4):
            await place.ask(channel, payload)  # 2 MiB there and back
        seconds = time.monotonic() - started_s
        assert 0.4 < seconds < 2.0, "8 MiB, less a burst"
        await channel.close()


async def test_somebody_else_cannot_register_as_this_peer() -> None:
    async with tied() as place:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
        writer.write(Frame(Kind.REGISTER).encode())
        await reader.readexactly(3 + 32)
        key = place.provider.public_key_der
        writer.write(Frame(Kind.PROOF, len(key).to_bytes(2) + key + bytes(256)).encode())
        assert await reader.read() == b"", "the connection is ended"
        writer.close()
        channel = place.channel()
        assert await place.ask(channel) == b"hello"
        await channel.close()


async def test_nothing_counts_that_comes_with_what_is_out_of_order() -> None:
    async with tied() as place:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
        writer.write(Frame(Kind.REGISTER).encode())
        nonce = (await reader.readexactly(3 + 32))[3:]
        writer.write(Frame(Kind.PONG).encode() + proof(identity(2), place.tether.relay_id, nonce).encode())
        assert await reader.read() == b"", "the connection is ended"
        assert place.relay.board.providers == 1, "only the peer that was there"
        writer.close()


async def test_a_peer_that_comes_again_is_served_at_its_new_line() -> None:
    async with tied() as place:
        again = Tether(place.provider, place.tether.relay_id, (("127.0.0.1", place.relay.port),), lambda: place.target)
        task = asyncio.create_task(again.run())
        async with asyncio.timeout(TIMEOUT_S):
            await again.welcome
            with pytest.raises(PeerLost):
                await place.task
        channel = place.channel()
        assert await place.ask(channel) == b"hello"
        assert place.relay.board.providers == 1
        await channel.close()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_full_relay_says_so() -> None:
    async with tied(RelayLimits(providers=1)) as place:
        one_more = Tether(identity(2), place.tether.relay_id, (("127.0.0.1", place.relay.port),), lambda: None)
        with pytest.raises(PeerFull, match="as many peers as it can"):
            async with asyncio.timeout(TIMEOUT_S):
                await one_more.run()


async def test_a_relay_that_ends_is_lost_at_once() -> None:
    async with tied() as place:
        channel = place.channel()
        assert await place.ask(channel) == b"hello"
        await place.relay.close()
        async with asyncio.timeout(2.0):
            with pytest.raises(PeerLost, match="the relay is lost"):
                await place.task
        await channel.close()


@contextlib.asynccontextmanager
async def hostile(said: bytes, taken: Callable[[], None] = lambda: None) -> AsyncIterator[tuple[Tether, list[bytes]]]:
    """A tether to a relay that says this at once, and all that it hears on connections that come later.

    Args:
        taken: called for each connection to the peer's own port.
    """
    heard: list[bytes] = []
    is_first = True

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            writer.write(said)
        else:
            heard.append(await reader.readexactly(3 + TOKEN_BYTES))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def own(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    servers = [await asyncio.start_server(each, "127.0.0.1", 0, backlog=512) for each in (relay, own)]
    at, target = (server.sockets[0].getsockname() for server in servers)
    tether = Tether(identity(1), identity(0).peer_id, (at,), lambda: target)
    task = asyncio.create_task(tether.run())
    try:
        yield tether, heard
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, PeerLost):
            await task
        for server in servers:
            server.close()


async def test_a_relay_that_says_all_at_once_is_heard_to_the_end() -> None:
    """A second welcome ended the peer; a call right behind the first was lost."""
    dial = Frame(Kind.DIAL, b"t" * TOKEN_BYTES)
    welcome = Frame(Kind.WELCOME, b"192.0.2.1").encode()
    async with hostile(welcome + welcome + dial.encode()) as (tether, heard):
        await until(lambda: bool(heard))
        assert tether.holds
        assert heard == [Frame(Kind.DATA, dial.body).encode()]


async def test_a_relay_that_calls_without_end_is_answered_so_often_and_no_more() -> None:
    """Calls counted only once they stood, so that one read could begin hundreds."""
    calls = b"".join(Frame(Kind.DIAL, number.to_bytes(TOKEN_BYTES)).encode() for number in range(3 * MAX_CALLS))
    taken: list[None] = []
    said = Frame(Kind.WELCOME, b"192.0.2.1").encode() + calls
    async with hostile(said, lambda: taken.append(None)) as (_, heard):
        await until(lambda: len(heard) == MAX_CALLS)
        await asyncio.sleep(0.2)  # for more to come, if more do
        assert len(taken) == len(heard) == MAX_CALLS


async def test_nobody_is_at_the_relays_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    tether = Tether(identity(1), identity(0).peer_id, (("127.0.0.1", port),), lambda: None)
    with pytest.raises(PeerLost):
        await tether.run()
    with pytest.raises(PeerLost):
        await tether.welcome


async def test_garbage_and_silence_leave_nothing_behind() -> None:
    limits = RelayLimits(hello_s=0.3, strangers_per_block=50, dial_s=0.3)
    async with tied(limits) as place:
        before = psutil.Process().num_fds()
        for payload in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70000), b"\x09" + bytes(40)):
            for _ in range(60):
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
                    writer.write(payload)
                    writer.transport.abort()
        slow = [await asyncio.open_connection("127.0.0.1", place.relay.port) for _ in range(60)]
        await asyncio.sleep(0.05)
        channel = place.channel()
        for reader, _ in slow:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(3.0):
                    assert await reader.read() == b""
        assert await place.ask(channel) == b"hello"
        await channel.close()
        for _, writer in slow:
            writer.close()
        del slow
        await until(lambda: psutil.Process().num_fds() <= before)


def silence() -> Saying:
    return b"", 0.0


def garbage() -> Saying:
    return os.urandom(2000), 0.0


def slow_hello() -> Saying:
    return hello_of("nobody.example"), 0.02


def unknown_name() -> Saying:
    return hello_of(certificate_name(identity(3).peer_id)), 0.0


def never_whole() -> Saying:
    return b"\x16\3\1\x40\0\1\0\x20\0" + bytes(9000), 0.0


def no_proof() -> Saying:
    return Frame(Kind.REGISTER).encode(), 0.0


def wrong_proof() -> Saying:
    return Frame(Kind.REGISTER).encode() + proof(identity(1), "another relay", bytes(NONCE_BYTES)).encode(), 0.0


def wrong_token() -> Saying:
    return Frame(Kind.DATA, os.urandom(TOKEN_BYTES)).encode() + b"bytes for somebody", 0.0


STRANGERS = (silence, garbage, slow_hello, unknown_name, never_whole, no_proof, wrong_proof, wrong_token)


async def stranger(port: int, saying: Saying) -> None:
    """Says this, a byte at a time if there is a pause, until the relay has ended the connection."""
    data, pause_s = saying
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for piece in [data] if not pause_s else [bytes([byte]) for byte in data]:
            writer.write(piece)
            await asyncio.sleep(pause_s)
            if writer.transport.is_closing():
                break
        await reader.read()
        writer.close()


async def test_rounds_of_strangers_of_one_block_leave_no_count() -> None:
    """More at once than may come from there, of all kinds; a right client gets through after each round."""
    limits = RelayLimits(hello_s=0.4, dial_s=0.4, strangers_per_block=40)
    async with tied(limits) as place:
        board, before = place.relay.board, psutil.Process().num_fds()
        for _ in range(3):
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.gather(*(stranger(place.relay.port, kind()) for _ in range(10) for kind in STRANGERS))
            await until(lambda: not board._strangers)
            channel = place.channel()
            assert await place.ask(channel) == b"hello"
            await channel.close()
            await until(lambda: not any((board._waiting, board.calls, board.seeks)))
            assert list(board._providers) == [certificate_name(place.provider.peer_id)]
            await until(lambda: psutil.Process().num_fds() <= before)
        assert {"peer-full", "peer-lost", "bad-message", "bad-record"} <= set(place.relay.refusals)


async def test_what_a_client_does_not_read_stays_with_the_peer() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(65536))
                await writer.drain()
                sent += 65536

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    async with tied() as place, server:
        place.target = server.sockets[0].getsockname()
        reader, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
        writer.transport.pause_reading()
        writer.write(hello_of(certificate_name(place.provider.peer_id)))
        await until(lambda: sent > 1 << 20)
        before = -1
        while sent != before:  # the kernel's buffers fill
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 64 << 20
        writer.transport.abort()
        await until(lambda: place.relay.board.calls == 0)
        del reader


async def test_idle_connections_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.reach.relay.SWEEP_S", 0.05)
    async with tied(RelayLimits(idle_s=0.2)) as place:
        channel = place.channel()
        await place.ask(channel)
        await until(lambda: place.relay.board.calls == 0)
        answer = b""
        while not answer:  # a call that meets the end of a connection fails
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await place.ask(channel)
        await channel.close()


async def test_what_it_does_is_counted_for_prometheus() -> None:
    """As a peer's /metrics has it; the peer serves no blocks yet."""
    async with tied(RelayLimits(providers=1)) as place:
        served = Served("m", "f" * 32, 4, (0, 4))
        config = PeerConfig(host="127.0.0.1", lan=False)
        standing = Standing(identity(0), served, Span(0, 4), config, lambda: ["127.0.0.1"])
        async with serving_metrics(standing, "127.0.0.1", 0) as url:
            assert not await relay_metrics(url), "it does not relay"
            standing.relay = place.relay
            channel = place.channel()
            await place.ask(channel, bytes(100_000))
            one_more = Tether(identity(2), place.tether.relay_id, (("127.0.0.1", place.relay.port),), lambda: None)
            with pytest.raises(PeerFull):
                await one_more.run()
            stranger = place.channel(identity(3))
            assert not await connected(stranger, 2.0)
            await stranger.close()
            _, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            await until(lambda: place.relay.refusals["bad-message"] > 0)
            writer.close()
            found = await relay_metrics(url)
            assert found["peers"] == found["peers_limit"] == 1
            assert found["meetings_total"] == 0
            assert found["connections"] == found["connections_total"] == 1
            assert 200_000 < found["bytes_total"] == place.relay.carried_bytes < 250_000
            assert found["refusals_total peer-full"] == found["refusals_total bad-message"] == 1
            assert found["refusals_total peer-lost"] >= 1, "grpc tries again"
            await channel.close()
            await until(lambda: place.relay.board.calls == 0)
            after = await relay_metrics(url)
            assert after["connections"] == 0 and after["connections_total"] == 1


async def relay_metrics(url: str) -> dict[str, float]:
    """The relay's samples, by what follows `potluck_peer_relay_`, and their labels."""

    def read() -> str:
        with urlopen(url, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
        return text

    return {
        " ".join((sample.name.removeprefix("potluck_peer_relay_"), *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
        if sample.name.startswith("potluck_peer_relay_")
    }
