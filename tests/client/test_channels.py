"""A client's channels: one for each peer, and none to peers that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.channels import Channels
from protocol.ping import round_trip_ms
from protocol.span import Span
from tests.harness import identity, open_host, record_of


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(2)


async def test_channels_to_peers_that_are_gone_are_closed(checkpoint: Path) -> None:
    channels = Channels()
    async with open_host(checkpoint, Span(0, 2)) as host:
        there = record_of(host)
        new = replace(there, addresses=("127.0.0.1:9",))
        assert channels.to(there) is channels.to(there)
        assert await round_trip_ms(channels.to(there), 5.0) is not None
        channels.to(new)
        await channels.forget_all_but([there, new])
        assert len(channels) == 2, "both are in the swarm"
        await channels.forget_all_but([])
        assert len(channels) == 1, "a peer that answers is there, whatever the swarm says"
        assert await round_trip_ms(channels.to(there), 5.0) is not None
    async with asyncio.timeout(10.0):
        while len(channels):
            await channels.forget_all_but([])
            await asyncio.sleep(0.01)
    await channels.close()


async def test_a_channel_that_cannot_connect_does_not_try_for_ever(checkpoint: Path) -> None:
    channels = Channels()
    async with open_host(checkpoint, Span(0, 2)) as host:
        there = record_of(host)
        another_came = replace(there, peer_id=identity(1).peer_id, certificate_der=identity(1).certificate_der)
        assert await round_trip_ms(channels.to(another_came), 1.0) is None
        await channels.forget_all_but([another_came])
        assert len(channels) == 0, "though its record has not expired"
        assert await round_trip_ms(channels.to(there), 5.0) is not None
    await channels.close()


async def test_a_lent_channel_is_closed_unless_it_is_kept(checkpoint: Path) -> None:
    channels = Channels()
    async with open_host(checkpoint, Span(0, 2)) as host:
        peer = record_of(host)
        async with channels.lent(peer) as channel:
            assert await round_trip_ms(channel, 5.0) is not None
        assert len(channels) == 0
        async with channels.lent(peer, keep=True) as kept:
            assert await round_trip_ms(kept, 5.0) is not None
        async with channels.lent(peer) as channel:
            assert channel is kept
        await channels.close()
