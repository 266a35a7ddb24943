"""Round trips to the peers that are likely to come next in a chain, for clients to choose chains by."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from dht.record import MAX_RTT_MS, MAX_RTTS, PeerRecord
from protocol.channel import open_channel
from protocol.limits import MESSAGE_BYTES, WIRE_VERSION
from protocol.mean import smoothed
from protocol.ping import round_trip_ms
from protocol.span import Span

PING_EVERY_S = 30.0
PING_TIMEOUT_S = 2.0
FORGET_S = 300.0  # a round trip that was not measured again
NEAREST = 5  # of up to MAX_RTTS that are pinged; the rest is for those that were not measured yet


class Neighbours:
    """Measures and remembers round trips. `run` it beside a serving peer.

    Args:
        peer_id: this peer's, which is not its own neighbour.
        span: what this peer serves at the moment.
        online: the peers of the same model at the moment.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        peer_id: str,
        span: Callable[[], Span],
        online: Callable[[], Sequence[PeerRecord]],
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peer_id = peer_id
        self._span = span
        self._online = online
        self._rng = rng or random.Random()
        self._clock = clock
        self._measured: dict[str, tuple[float, float]] = {}  # by peer id: milliseconds, and when

    def rtts_ms(self) -> tuple[tuple[str, float], ...]:
        """(peer id, milliseconds) of those measured lately, nearest first; as many as a record holds."""
        now_s = self._clock()
        self._measured = {p: (ms, at_s) for p, (ms, at_s) in self._measured.items() if now_s - at_s <= FORGET_S}
        ranked = sorted((ms, peer_id) for peer_id, (ms, _) in self._measured.items())
        return tuple((peer_id, ms) for ms, peer_id in ranked[:MAX_RTTS])

    async def run(self) -> None:
        """Pings every `PING_EVERY_S`, for ever."""
        while True:
            await self.measure()
            await asyncio.sleep(PING_EVERY_S)

    async def measure(self) -> None:
        """Pings the likely next peers once. One that does not answer keeps what was measured before, for a while."""
        others = [peer for peer in self._online() if peer.peer_id != self._peer_id]
        async with asyncio.TaskGroup() as tasks:
            for peer in likely_next(others, self._span(), dict(self.rtts_ms()), self._rng):
                tasks.create_task(self._ping(peer), name=f"ping {peer.peer_id[-8:]}")

    async def _ping(self, peer: PeerRecord) -> None:
        channel = open_channel(peer.addresses, peer.certificate_der, max_message_bytes=MESSAGE_BYTES)
        try:
            rtt_ms = await round_trip_ms(channel, PING_TIMEOUT_S)
        finally:
            await channel.close(None)
        if rtt_ms is not None:
            before_ms, _ = self._measured.get(peer.peer_id, (None, 0.0))
            self._measured[peer.peer_id] = (min(MAX_RTT_MS, smoothed(before_ms, rtt_ms)), self._clock())


def likely_next(
    peers: Iterable[PeerRecord], span: Span, known_ms: Mapping[str, float], rng: random.Random
) -> list[PeerRecord]:
    """The peers to ping: of those that can go on where `span` stops, the nearest so far, and some others at random."""
    able = [peer for peer in peers if span.stop in peer.span and peer.addresses and peer.wire_version == WIRE_VERSION]
    nearest = sorted((p for p in able if p.peer_id in known_ms), key=lambda p: known_ms[p.peer_id])[:NEAREST]
    chosen = {peer.peer_id for peer in nearest}
    others = [peer for peer in able if peer.peer_id not in chosen]
    return nearest + rng.sample(others, min(len(others), MAX_RTTS - len(nearest)))
