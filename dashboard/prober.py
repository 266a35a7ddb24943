"""Asks peers whether they are there, over the channels that clients would use: pinned to the certificates in records.

A swarm of up to `probe_peers` is asked as a whole in each round, over connections that stay open, so that a peer that
was killed is known within seconds. Of a larger one, those are asked that were not asked for longest.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import grpc.aio

from dashboard.config import DashboardConfig
from dashboard.health import Reach
from dht.record import PeerRecord
from protocol.channel import connected, has_failed, open_channel
from protocol.limits import MESSAGE_BYTES
from protocol.mean import smoothed
from protocol.ping import round_trip_ms

ROUND_TRIPS = 4.0  # that an answer may take: a far peer is not a silent one
CLOSE_TIMEOUT_S = 2.0

Key = tuple[str, tuple[str, ...], bytes]


class Prober:
    """Knows which peers answer. `run` it.

    Args:
        peers: all that there are, at any moment.

    Attributes:
        reach: of peers that were asked, by id.
        asked: how often peers were asked, by `answered` or `silent`.
    """

    def __init__(self, config: DashboardConfig, peers: Callable[[], Sequence[PeerRecord]]) -> None:
        self.reach: dict[str, Reach] = {}
        self.asked: Counter[str] = Counter(answered=0, silent=0)
        self._config = config
        self._peers = peers
        self._channels: dict[Key, grpc.aio.Channel] = {}
        self._asked_s: dict[str, float] = {}
        self._asking: set[str] = set()
        self._room = asyncio.Semaphore(config.probes_at_once)
        self._rng = random.Random()

    async def run(self) -> NoReturn:
        """Asks in rounds, for ever. A peer that is slow to answer does not hold up those that are asked beside it."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._forget()
                    room = self._config.probe_peers - len(self._asking)
                    waiting = [peer for peer in self._able() if peer.peer_id not in self._asking]
                    for peer in stalest(waiting, self._asked_s, room, self._rng):
                        self._asking.add(peer.peer_id)
                        tasks.create_task(self._ask(peer), name=f"probe {peer.peer_id[-8:]}")
                    await asyncio.sleep(self._config.probe_every_s)
        finally:
            await self._close(list(self._channels.values()))

    async def _ask(self, peer: PeerRecord) -> None:
        try:
            async with self._room:
                before = self.reach.get(peer.peer_id, Reach())
                rtt_ms = await self._round_trip_ms(peer, before)
        finally:
            self._asking.discard(peer.peer_id)
        self._asked_s[peer.peer_id] = time.monotonic()
        self.asked["silent" if rtt_ms is None else "answered"] += 1
        if rtt_ms is None:
            self.reach[peer.peer_id] = Reach(answers=False, ever=before.ever)
        else:
            known_ms = before.rtt_ms if before.answers else None
            self.reach[peer.peer_id] = Reach(answers=True, rtt_ms=smoothed(known_ms, rtt_ms), ever=True)

    async def _round_trip_ms(self, peer: PeerRecord, before: Reach) -> float | None:
        """Over the open connection; where that fails, over a new one: a connection that broke is not a lost peer."""
        key = _key(peer)
        if before.answers and key in self._channels and not has_failed(self._channels[key]):
            wait_s = max(self._config.probe_timeout_s, ROUND_TRIPS * (before.rtt_ms or 0.0) / 1e3)
            if (rtt_ms := await round_trip_ms(self._channels[key], wait_s)) is not None:
                return rtt_ms
        else:
            wait_s = self._config.first_probe_timeout_s
        if key in self._channels:
            await self._close([self._channels.pop(key)])
        channel = self._channels[key] = open_channel(*key[1:], max_message_bytes=MESSAGE_BYTES)
        if not await connected(channel, wait_s):
            return None
        return await round_trip_ms(channel, wait_s)

    async def _forget(self) -> None:
        """Whoever is gone, or moves; and connections, where there are too many peers to keep them."""
        peers = self._able()
        ids = {peer.peer_id for peer in peers}
        self.reach = {peer_id: reach for peer_id, reach in self.reach.items() if peer_id in ids}
        self._asked_s = {peer_id: at_s for peer_id, at_s in self._asked_s.items() if peer_id in ids}
        kept = {_key(peer) for peer in peers} if len(peers) <= self._config.probe_peers else set()
        gone = [key for key in self._channels if key not in kept and key[0] not in self._asking]
        await self._close([self._channels.pop(key) for key in gone])

    def _able(self) -> list[PeerRecord]:
        """Who can be asked: a peer that loads or moves has its port closed, and that is no fault."""
        return [peer for peer in self._peers() if peer.addresses and peer.state != "joining"]

    async def _close(self, channels: Sequence[grpc.aio.Channel]) -> None:
        with contextlib.suppress(TimeoutError):  # what has not ended by then ends with the process
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*(channel.close(None) for channel in channels))


def stalest(
    peers: Sequence[PeerRecord], asked_s: Mapping[str, float], count: int, rng: random.Random
) -> list[PeerRecord]:
    """Up to `count` peers, those first that were not asked for longest; equals in random order."""
    ranked = sorted(peers, key=lambda peer: (asked_s.get(peer.peer_id, 0.0), rng.random()))
    return ranked[: max(0, count)]


def _key(peer: PeerRecord) -> Key:
    return peer.peer_id, peer.addresses, peer.certificate_der
