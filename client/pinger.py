"""Measures the round trips to peers, before the first route and ever after, a few at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

import grpc.aio

from client.times import Stopwatch
from dht.record import PeerRecord
from protocol.ping import round_trip_ms

PING_TIMEOUT_S = 1.0
FIRST_WAIT_S = 1.0  # for all first pings together: who has not answered by then is as far as the others, in the median
FIRST_PEERS = 32
SAMPLE_PEERS = 8
AT_ONCE = 8

Lend = Callable[[PeerRecord], AbstractAsyncContextManager[grpc.aio.Channel]]


class Pinger:
    """Tells a stopwatch of round trips. A peer that does not answer has none; that is not blamed.

    Args:
        lend: a channel to a peer, for a while.
        peers: all that may be asked, at any moment.
        every_s: seconds between two samples.
    """

    def __init__(
        self, stopwatch: Stopwatch, lend: Lend, peers: Callable[[], Sequence[PeerRecord]], every_s: float
    ) -> None:
        self._stopwatch = stopwatch
        self._lend = lend
        self._peers = peers
        self._every_s = every_s
        self._rng = random.Random()

    async def first(self, peers: Iterable[PeerRecord], lend: Lend) -> None:
        """Measures peers of which nothing is known yet, so that the first route is a good one. At most a second."""
        unknown = [peer for peer in peers if self._stopwatch.rtt_age_s(peer.peer_id) == float("inf")]
        try:
            async with asyncio.timeout(FIRST_WAIT_S):
                await self._ping(stalest(unknown, self._stopwatch.rtt_age_s, FIRST_PEERS, self._rng), lend)
        except TimeoutError:
            return

    async def run(self) -> None:
        """Measures a sample now and then, for ever: those first that were not measured for longest."""
        while True:
            await asyncio.sleep(self._every_s)
            await self._ping(stalest(self._peers(), self._stopwatch.rtt_age_s, SAMPLE_PEERS, self._rng), self._lend)

    async def _ping(self, peers: Sequence[PeerRecord], lend: Lend) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def ping(peer: PeerRecord) -> None:
            async with room, lend(peer) as channel:
                rtt_ms = await round_trip_ms(channel, PING_TIMEOUT_S)
            if rtt_ms is not None:
                self._stopwatch.note_rtt(peer.peer_id, rtt_ms)

        async with asyncio.TaskGroup() as tasks:
            for peer in peers:
                tasks.create_task(ping(peer), name=f"ping {peer.peer_id[-8:]}")


def stalest(
    peers: Iterable[PeerRecord], age_s: Callable[[str], float], count: int, rng: random.Random
) -> list[PeerRecord]:
    """Up to `count` peers, those first that were not measured for longest; equals in random order."""
    ranked = sorted(peers, key=lambda peer: (-age_s(peer.peer_id), rng.random()))
    return ranked[:count]
