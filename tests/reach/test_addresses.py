"""A peer with several addresses: the first that answers is used, then the next one, and the direct one if it can be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc.aio
import pytest

from client import channels as module
from client.channels import Channels
from dht.record import PeerRecord
from peer.reach.relay import Relay, RelaySettings, open_relay
from peer.reach.tether import Tether
from protocol.channel import targets
from protocol.errors import PeerLost
from protocol.ping import round_trip_ms
from protocol.span import Span
from tests.harness import identity
from tests.reach.support import answering

TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[Relay]:
    """A relay to which the peer at that port is tied."""
    async with open_relay(identity(0).peer_id, RelaySettings("127.0.0.1", 0, 1e5)) as relay:
        tether = Tether(identity(1), identity(0).peer_id, (("127.0.0.1", relay.port),), lambda: ("127.0.0.1", port))
        task = asyncio.create_task(tether.run())
        async with asyncio.timeout(TIMEOUT_S):
            await tether.welcome
        try:
            yield relay
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, PeerLost):
                await task


@contextlib.asynccontextmanager
async def silence() -> AsyncIterator[int]:
    """A port at which somebody takes connections and says nothing."""
    taken: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in taken:
            writer.transport.abort()


async def carried_by(channel: grpc.aio.Channel, relay: Relay) -> int:
    """Bytes that the relay carried while that channel was used for some calls."""
    before = relay.carried_bytes
    for _ in range(20):
        assert await round_trip_ms(channel, TIMEOUT_S) is not None
    return relay.carried_bytes - before


def record(*ports: int, relayed: int = 0) -> PeerRecord:
    return PeerRecord(
        peer_id=identity(1).peer_id,
        fingerprint="f",
        n_blocks=1,
        span=Span(0, 1),
        state="online",
        addresses=tuple(f"127.0.0.1:{port}" for port in ports),
        relayed=relayed,
        certificate_der=identity(1).certificate_der,
    )


@pytest.mark.parametrize(
    ("addresses", "wanted"),
    [
        (["192.0.2.1:5"], ("ipv4:192.0.2.1:5",)),
        (["[2001:db8::1]:5"], ("ipv6:[2001:db8::1]:5",)),
        (["192.0.2.1:5", "192.0.2.2:6"], ("ipv4:192.0.2.1:5,192.0.2.2:6",)),
        (["[2001:db8::1]:5", "192.0.2.2:6"], ("ipv6:[2001:db8::1]:5,[::ffff:192.0.2.2]:6",)),
        (["home.example:5"], ("dns:///home.example:5",)),
        (["home.example:5", "192.0.2.2:6"], ("dns:///home.example:5", "ipv4:192.0.2.2:6")),
        (["192.0.2.2:6", "home.example:5"], ("ipv4:192.0.2.2:6", "dns:///home.example:5")),
    ],
)
def test_what_grpc_calls_them(addresses: list[str], wanted: tuple[str, ...]) -> None:
    assert targets(addresses) == wanted


async def test_an_address_that_is_silent_holds_up_nobody() -> None:
    async with answering(1) as port, silence() as silent:
        channels, started_s = Channels(), time.monotonic()
        assert await round_trip_ms(channels.to(record(silent, port)), TIMEOUT_S) is not None
        assert time.monotonic() - started_s < 2.0
        await channels.close()


async def test_a_relay_that_ends_is_replaced_by_the_next_on_the_same_channel() -> None:
    async with answering(1) as port, relay_to(port) as first, relay_to(port) as second:
        there = record(first.port, second.port, relayed=2)
        channels = Channels()
        channel = channels.to(there)
        assert await round_trip_ms(channel, TIMEOUT_S) is not None
        assert first.carried_bytes and not second.carried_bytes
        await first.close()
        async with asyncio.timeout(TIMEOUT_S):
            while await round_trip_ms(channel, TIMEOUT_S) is None:  # a call that meets the end of a connection fails
                await asyncio.sleep(0.01)
        assert second.carried_bytes
        await channels.close()


async def test_a_relay_that_falls_silent_is_left_once_the_peer_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with answering(1) as port, relay_to(port) as relay, silence() as silent:
        there, channels = record(relay.port, silent, relayed=2), Channels()
        channel = channels.to(there)
        assert channels.to(there, doubted=True) is channel, "it has only just been made"
        monkeypatch.setattr(module, "DOUBT_S", 0.0)
        assert channels.to(there, doubted=True) is not channel
        assert channels.to(record(port), doubted=True) is channels.to(record(port), doubted=True), "no other way"
        assert await round_trip_ms(channel, TIMEOUT_S) is not None, "whoever uses it still can"
        await channels.close()


async def test_the_direct_way_is_taken_when_it_works_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIRECT_EVERY_S", 0.0)
    monkeypatch.setattr(module, "DIRECT_TIMEOUT_S", 0.5)
    async with answering(1) as inner, relay_to(inner) as relay, silence() as port:
        there, channels = record(port, relay.port, relayed=1), Channels()
        before = channels.to(there)
        through_relay_bytes = await carried_by(before, relay)
        await channels.go_direct([there])
        assert channels.to(there) is before, "it does not answer"
        there_too = replace(there, addresses=(f"127.0.0.1:{inner}", there.addresses[1]))
        channels.to(there_too)
        await channels.go_direct([there_too, record(inner)])
        # Not none at all: the old connection's last acknowledgements may come when the new one is in use.
        assert await carried_by(channels.to(there_too), relay) < through_relay_bytes / 2, "they went through the relay"
        assert await round_trip_ms(before, TIMEOUT_S) is not None, "whoever uses it still can"
        await channels.close()


async def test_names_and_addresses_take_turns() -> None:
    async with answering(1) as port:
        there = replace(record(port), addresses=("nowhere.invalid:5", f"127.0.0.1:{port}"))
        channels = Channels()
        assert await round_trip_ms(channels.to(there), 2.0) is None
        assert await round_trip_ms(channels.to(there), TIMEOUT_S) is not None
        await channels.close()
