"""Round trips that a client measures, to real peers on loopback and to ports where nobody answers."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest

from client.pinger import FIRST_PEERS, FIRST_WAIT_S, Pinger, stalest
from client.times import Stopwatch
from dht.record import PeerRecord
from protocol.channel import open_channel
from protocol.limits import MESSAGE_BYTES
from protocol.ping import round_trip_ms
from protocol.span import Span
from tests.client.test_chain import BLANK
from tests.harness import identity, open_host, record_of
from tests.waiting import until

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(2)


@pytest.fixture
def silent() -> Iterator[PeerRecord]:
    """A peer whose port takes connections and says nothing: frozen, or behind a black hole."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        yield replace(
            BLANK,
            peer_id="silent",
            addresses=(f"127.0.0.1:{port}",),
            certificate_der=identity(7).certificate_der,
        )


@asynccontextmanager
async def lend(peer: PeerRecord) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_channel(peer.addresses[0], peer.certificate_der, max_message_bytes=MESSAGE_BYTES)
    try:
        yield channel
    finally:
        await channel.close(None)


async def test_the_round_trip_to_a_peer(checkpoint: Path) -> None:
    async with open_host(checkpoint, Span(0, 2)) as host, lend(record_of(host)) as channel:
        rtt_ms = await round_trip_ms(channel, PATIENCE_S)
        assert rtt_ms is not None
        assert 0 < rtt_ms < PATIENCE_S * 1e3


async def test_there_is_none_to_a_peer_that_does_not_answer(silent: PeerRecord) -> None:
    async with lend(silent) as channel:
        assert await round_trip_ms(channel, 0.1) is None


async def test_there_is_none_to_somebody_else(checkpoint: Path) -> None:
    async with open_host(checkpoint, Span(0, 2)) as host:
        other = replace(record_of(host), certificate_der=identity(8).certificate_der)
        async with lend(other) as channel:
            assert await round_trip_ms(channel, 0.5) is None


async def test_there_is_none_over_a_channel_that_was_closed(checkpoint: Path) -> None:
    async with open_host(checkpoint, Span(0, 2)) as host:
        async with lend(record_of(host)) as channel:
            assert await round_trip_ms(channel, PATIENCE_S) is not None
        assert await round_trip_ms(channel, PATIENCE_S) is None


async def test_before_the_first_route_all_are_asked_and_none_is_waited_for_long(
    checkpoint: Path, silent: PeerRecord
) -> None:
    stopwatch = Stopwatch()
    asked: list[str] = []

    def noting(peer: PeerRecord) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        asked.append(peer.peer_id)
        return lend(peer)

    pinger = Pinger(stopwatch, lend, list, every_s=60.0)
    async with open_host(checkpoint, Span(0, 2)) as host:
        peer = record_of(host)
        started_s = asyncio.get_running_loop().time()
        await pinger.first([silent, peer], noting)
        assert asyncio.get_running_loop().time() - started_s < FIRST_WAIT_S + PATIENCE_S
        assert set(stopwatch.snapshot().rtts_ms) == {peer.peer_id}
        assert sorted(asked) == sorted([peer.peer_id, "silent"])
        await pinger.first([peer], noting)
        assert len(asked) == 2, "what is known is not asked again"


async def test_samples_are_measured_ever_after(checkpoint: Path) -> None:
    stopwatch = Stopwatch()
    async with open_host(checkpoint, Span(0, 2)) as host:
        peers: list[PeerRecord] = []
        running = asyncio.create_task(Pinger(stopwatch, lend, lambda: peers, every_s=0.01).run())
        peers.append(record_of(host))
        await until(lambda: bool(stopwatch.snapshot().rtts_ms), "a round trip to be measured")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


def test_those_not_measured_for_longest_are_asked_first() -> None:
    peers = [replace(BLANK, peer_id=str(i)) for i in range(100)]
    ages_s = {"3": 50.0, "5": 10.0, "7": 70.0}
    rng = random.Random(0)
    assert [p.peer_id for p in stalest(peers, lambda p: ages_s.get(p, 0.0), 3, rng)] == ["7", "3", "5"]
    first, second = (
        {p.peer_id for p in stalest(peers, lambda _: float("inf"), FIRST_PEERS, random.Random(seed))} for seed in (1, 2)
    )
    assert len(first) == len(second) == FIRST_PEERS
    assert first != second
