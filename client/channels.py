"""A client's channels to peers: one for each, shared by all its sessions.

Where a channel goes through a relay, ways without it are sought beside it: the peer's own addresses, if it has some;
else a connection that both make at once (`protocol.bypass`). New sessions use what was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import grpc
import grpc.aio

from dht.record import PeerRecord
from protocol.bypass import Bypass, find_bypass
from protocol.channel import connected, has_failed, open_channel
from protocol.errors import PeerLost
from protocol.limits import MESSAGE_BYTES

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
DIRECT_TIMEOUT_S = 2.0
DIRECT_EVERY_S = 60.0  # between two attempts to do without a relay, doubled each time that it does not work
DIRECT_AT_LEAST_EVERY_S = 3600.0
APPROACH_S = 1.0  # that a session which begins waits for a way without a relay, once for each peer
AT_ONCE = 4  # ways that are sought
DOUBT_S = 1.0  # a channel that is younger is not doubted

Key = tuple[str, tuple[str, ...], bytes]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What became of the attempts to do without a relay. Monotonic seconds.

    Attributes:
        again_s: when to try again.
        pause_s: how long that is from the last attempt.
    """

    worked: bool = False
    again_s: float = float("-inf")
    pause_s: float = 0.0

    def failed(self, now_s: float) -> _Attempt:
        pause_s = min(max(DIRECT_EVERY_S, 2 * self.pause_s), DIRECT_AT_LEAST_EVERY_S)
        return _Attempt(again_s=now_s + pause_s, pause_s=pause_s)


NEVER, WORKED = _Attempt(), _Attempt(worked=True)


class Channels:
    """For the loop in which they are used.

    Args:
        direct: seek ways to hidden peers that go round their relays.
    """

    def __init__(self, *, direct: bool = True) -> None:
        self._meets = direct
        self._channels: dict[Key, grpc.aio.Channel] = {}
        self._failed: list[grpc.aio.Channel] = []  # replaced, and to be closed
        # Replaced, but sessions may still use them: grpc closes a channel that nobody has any more.
        self._left: WeakSet[grpc.aio.Channel] = WeakSet()
        self._opened_s: dict[Key, float] = {}
        self._turns: dict[Key, int] = {}  # how often one has failed
        self._used: set[Key] = set()  # by sessions
        self._attempts: dict[Key, _Attempt] = {}  # to do without relays
        self._bypasses: dict[Key, Bypass] = {}  # of the channels that go over one
        self._seeking: dict[Key, asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

    def __len__(self) -> int:
        return len(self._channels)

    def to(self, peer: PeerRecord, *, doubted: bool = False) -> grpc.aio.Channel:
        """The channel to a peer, pinned to the certificate in its record; a new one, if it could not connect lately.

        Args:
            doubted: the peer failed lately. If there are several ways to it, perhaps only one of them did, and
                silently: then there is a new channel, too.
        """
        self._used.add(_key(peer))
        return self._to(peer, doubted=doubted)

    def _to(self, peer: PeerRecord, *, doubted: bool = False) -> grpc.aio.Channel:
        key = _key(peer)
        age_s = time.monotonic() - self._opened_s.get(key, 0.0)
        is_only_way = len(peer.addresses) == 1 and key not in self._bypasses
        if doubted and key in self._channels and not is_only_way and age_s >= DOUBT_S:
            self._left.add(self._channels.pop(key))
            self._bypasses.pop(key, None)  # it ends with the channel
            self._attempts.pop(key, None)
        if key in self._channels and has_failed(self._channels[key]):
            self._failed.append(self._give_up(key))
        if key in self._bypasses and self._bypasses[key].is_over:
            self._failed.append(self._channels.pop(key))
            self._end_bypass(key)
        if key not in self._channels:
            self._take_over(key)
        if key not in self._channels:
            self._channels[key] = _open(peer, peer.addresses, self._turns.get(key, 0))
            self._opened_s[key] = time.monotonic()
        return self._channels[key]

    @contextlib.asynccontextmanager
    async def lent(self, peer: PeerRecord, *, keep: bool = False) -> AsyncIterator[grpc.aio.Channel]:
        """The sessions' channel to a peer; where there is none, one that is closed afterwards, or kept for sessions."""
        if keep or _key(peer) in self._channels:
            yield self._to(peer)
            return
        channel = _open(peer, peer.addresses)
        try:
            yield channel
        finally:
            await channel.close(None)

    async def forget_all_but(self, peers: Iterable[PeerRecord]) -> None:
        """Closes channels to peers that are gone, and those that could not connect, which would try it for ever: where
        another peer has taken the port, each try is a handshake that fails. A connected one stays: its peer is there,
        whatever the swarm says."""
        self._failed += [channel for channel in self._left if has_failed(channel)]
        self._left -= set(self._failed)
        while self._failed:
            await self._failed.pop().close(None)
        known = {_key(peer) for peer in peers if peer.addresses}
        for key, channel in list(self._channels.items()):
            if has_failed(channel) or (key not in known and channel.get_state() is not grpc.ChannelConnectivity.READY):
                await self._give_up(key).close(None)
        self._turns = {key: turn for key, turn in self._turns.items() if key in known}
        self._opened_s = {key: opened_s for key, opened_s in self._opened_s.items() if key in self._channels}
        self._attempts = {key: attempt for key, attempt in self._attempts.items() if key in known}
        self._used &= known

    async def go_direct(self, peers: Iterable[PeerRecord]) -> None:
        """Where there is a channel through a relay: seeks a way without it, and has new sessions use that, if there is
        one. Sessions under way stay where they are."""
        await asyncio.gather(*(self._seek(peer) for peer in peers if _key(peer) in self._channels))

    async def approach(self, peers: Iterable[PeerRecord]) -> None:
        """Before a session begins: `go_direct`, to peers to which that was not tried before, for `APPROACH_S` at most.
        What takes longer is of use to the next session."""
        new = [peer for peer in peers if peer.relayed and _key(peer) not in self._attempts]
        for peer in new:
            self.to(peer)  # which is used from now on
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(APPROACH_S):
                await self.go_direct(new)

    async def _seek(self, peer: PeerRecord) -> None:
        """One attempt at a time, and seldom. Whoever waits for it may stop waiting."""
        key, now_s = _key(peer), time.monotonic()
        if key not in self._seeking:
            before = self._attempts.get(key, NEVER)
            meets = self._meets and key in self._used
            if not peer.relayed or not (peer.direct or meets) or before.worked or now_s < before.again_s:
                return
            self._attempts[key] = before.failed(now_s)
            self._seeking[key] = asyncio.ensure_future(self._go_direct(peer, meets))
            self._seeking[key].add_done_callback(lambda _: self._seeking.pop(key, None))
        await asyncio.wait({self._seeking[key]})

    async def _go_direct(self, peer: PeerRecord, meets: bool) -> None:
        key = _key(peer)
        bypass: Bypass | None = None
        async with self._room, contextlib.AsyncExitStack() as unused:
            channel = await _connected(peer, peer.direct) if peer.direct else None
            if channel is None and meets:
                try:
                    bypass = await find_bypass(peer.relays, peer.certificate_der)
                except PeerLost as error:
                    logger.debug("%s: %s", peer.peer_id[-8:], error.message)
                    return
                unused.callback(bypass.close)
                channel = await _connected(peer, (bypass.address,))
            if channel is None:
                return
            unused.push_async_callback(channel.close, None)
            if key in self._channels:
                unused.pop_all()
                self._left.add(self._channels[key])
                self._channels[key] = channel
                self._attempts[key] = WORKED
                if bypass is not None:
                    self._bypasses[key] = bypass

    async def close(self) -> None:
        """Closes all of them; streams that are open end."""
        seeking = list(self._seeking.values())
        for task in seeking:
            task.cancel()
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await asyncio.gather(*seeking, return_exceptions=True)
            await asyncio.gather(*(channel.close(None) for channel in self._all()))

    def _give_up(self, key: Key) -> grpc.aio.Channel:
        """Takes a channel out; the next one begins with other addresses, if there are any."""
        self._turns[key] = self._turns.get(key, 0) + 1
        self._attempts.pop(key, None)
        self._end_bypass(key)
        return self._channels.pop(key)

    def _take_over(self, key: Key) -> None:
        """A peer that has other relays now is still reached past the old ones, if it was."""
        peer_id, _, certificate_der = key
        for old in list(self._bypasses):
            if old != key and (old[0], old[2]) == (peer_id, certificate_der) and not self._bypasses[old].is_over:
                self._channels[key], self._bypasses[key] = self._channels.pop(old), self._bypasses.pop(old)
                self._opened_s[key] = self._opened_s.pop(old, 0.0)
                self._attempts[key] = WORKED
                return

    def _end_bypass(self, key: Key) -> None:
        """The next channel goes through the relay again, at first."""
        if (bypass := self._bypasses.pop(key, None)) is not None:
            bypass.close()
            self._attempts[key] = NEVER.failed(time.monotonic())

    def _all(self) -> list[grpc.aio.Channel]:
        return [*self._channels.values(), *self._failed, *self._left]


def _key(peer: PeerRecord) -> Key:
    return peer.peer_id, peer.addresses, peer.certificate_der


async def _connected(peer: PeerRecord, addresses: Sequence[str]) -> grpc.aio.Channel | None:
    """A channel to these addresses alone, if one of them answers as that peer."""
    channel = _open(peer, addresses)
    if await connected(channel, DIRECT_TIMEOUT_S):
        return channel
    await channel.close(None)
    return None


def _open(peer: PeerRecord, addresses: Sequence[str], turn: int = 0) -> grpc.aio.Channel:
    return open_channel(addresses, peer.certificate_der, max_message_bytes=MESSAGE_BYTES, turn=turn)
