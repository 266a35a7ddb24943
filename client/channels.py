"""A client's channels to peers: one for each, shared by all its sessions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence

import grpc
import grpc.aio

from dht.record import PeerRecord
from protocol.channel import connected, has_failed, open_channel
from protocol.limits import MESSAGE_BYTES

CLOSE_TIMEOUT_S = 5.0
DIRECT_TIMEOUT_S = 2.0
DIRECT_EVERY_S = 60.0  # between two attempts to do without a relay
DOUBT_S = 1.0  # a channel that is younger is not doubted

Key = tuple[str, tuple[str, ...], bytes]


class Channels:
    """For the loop in which they are used."""

    def __init__(self) -> None:
        self._channels: dict[Key, grpc.aio.Channel] = {}
        self._failed: list[grpc.aio.Channel] = []  # replaced, and to be closed
        self._left: list[grpc.aio.Channel] = []  # replaced, but sessions may still use them
        self._opened_s: dict[Key, float] = {}
        self._turns: dict[Key, int] = {}  # how often one has failed
        self._direct: dict[Key, tuple[float, bool]] = {}  # when that was tried, and whether it is so now

    def __len__(self) -> int:
        return len(self._channels)

    def to(self, peer: PeerRecord, *, doubted: bool = False) -> grpc.aio.Channel:
        """The channel to a peer, pinned to the certificate in its record; a new one, if it could not connect lately.

        Args:
            doubted: the peer failed lately. If it has several addresses, perhaps only a relay did, and silently: then
                there is a new channel, too.
        """
        key = _key(peer)
        age_s = time.monotonic() - self._opened_s.get(key, 0.0)
        if doubted and key in self._channels and len(peer.addresses) > 1 and age_s >= DOUBT_S:
            self._left.append(self._channels.pop(key))
            self._direct.pop(key, None)
        if key in self._channels and has_failed(self._channels[key]):
            self._failed.append(self._give_up(key))
        if key not in self._channels:
            self._channels[key] = _open(peer, peer.addresses, self._turns.get(key, 0))
            self._opened_s[key] = time.monotonic()
        return self._channels[key]

    @contextlib.asynccontextmanager
    async def lent(self, peer: PeerRecord, *, keep: bool = False) -> AsyncIterator[grpc.aio.Channel]:
        """The sessions' channel to a peer; where there is none, one that is closed afterwards, or kept for sessions."""
        if keep or _key(peer) in self._channels:
            yield self.to(peer)
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
        self._left = [channel for channel in self._left if channel not in self._failed]
        while self._failed:
            await self._failed.pop().close(None)
        known = {_key(peer) for peer in peers if peer.addresses}
        for key, channel in list(self._channels.items()):
            if has_failed(channel) or (key not in known and channel.get_state() is not grpc.ChannelConnectivity.READY):
                await self._give_up(key).close(None)
        self._turns = {key: turn for key, turn in self._turns.items() if key in known}
        self._opened_s = {key: opened_s for key, opened_s in self._opened_s.items() if key in self._channels}
        self._direct = {key: tried for key, tried in self._direct.items() if key in known}

    async def go_direct(self, peers: Iterable[PeerRecord]) -> None:
        """Where a relay was the first to answer, though a peer has other addresses too: tries these alone, and has new
        sessions use them if that works. Sessions under way stay where they are."""
        await asyncio.gather(*(self._go_direct(peer) for peer in peers if peer.relayed and peer.direct))

    async def _go_direct(self, peer: PeerRecord) -> None:
        key, now_s = _key(peer), time.monotonic()
        tried_s, is_direct = self._direct.get(key, (float("-inf"), False))
        if key not in self._channels or is_direct or now_s - tried_s < DIRECT_EVERY_S:
            return
        channel = _open(peer, peer.direct)
        is_direct = await connected(channel, DIRECT_TIMEOUT_S)
        self._direct[key] = now_s, is_direct
        if is_direct and key in self._channels:
            self._left.append(self._channels[key])
            self._channels[key] = channel
        else:
            await channel.close(None)

    async def close(self) -> None:
        """Closes all of them; streams that are open end."""
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await asyncio.gather(*(channel.close(None) for channel in self._all()))

    def _give_up(self, key: Key) -> grpc.aio.Channel:
        """Takes a channel out; the next one begins with other addresses, if there are any."""
        self._turns[key] = self._turns.get(key, 0) + 1
        self._direct.pop(key, None)
        return self._channels.pop(key)

    def _all(self) -> list[grpc.aio.Channel]:
        return [*self._channels.values(), *self._failed, *self._left]


def _key(peer: PeerRecord) -> Key:
    return peer.peer_id, peer.addresses, peer.certificate_der


def _open(peer: PeerRecord, addresses: Sequence[str], turn: int = 0) -> grpc.aio.Channel:
    return open_channel(addresses, peer.certificate_der, max_message_bytes=MESSAGE_BYTES, turn=turn)
