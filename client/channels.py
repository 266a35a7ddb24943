"""A client's channels to peers: one for each, shared by all its sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import grpc
import grpc.aio

from dht.record import PeerRecord
from protocol.channel import has_failed, open_channel
from protocol.limits import MESSAGE_BYTES

CLOSE_TIMEOUT_S = 5.0

Key = tuple[str, str, bytes]


class Channels:
    """For the loop in which they are used."""

    def __init__(self) -> None:
        self._channels: dict[Key, grpc.aio.Channel] = {}
        self._failed: list[grpc.aio.Channel] = []  # replaced, and to be closed

    def __len__(self) -> int:
        return len(self._channels)

    def to(self, peer: PeerRecord) -> grpc.aio.Channel:
        """The channel to a peer, pinned to the certificate in its record; a new one, if it could not connect lately."""
        key = _key(peer)
        if key in self._channels and has_failed(self._channels[key]):
            self._failed.append(self._channels.pop(key))
        if key not in self._channels:
            self._channels[key] = open_channel(peer.addresses[0], peer.certificate_der, max_message_bytes=MESSAGE_BYTES)
        return self._channels[key]

    @contextlib.asynccontextmanager
    async def lent(self, peer: PeerRecord, *, keep: bool = False) -> AsyncIterator[grpc.aio.Channel]:
        """The sessions' channel to a peer; where there is none, one that is closed afterwards, or kept for sessions."""
        if keep or _key(peer) in self._channels:
            yield self.to(peer)
            return
        channel = open_channel(peer.addresses[0], peer.certificate_der, max_message_bytes=MESSAGE_BYTES)
        try:
            yield channel
        finally:
            await channel.close(None)

    async def forget_all_but(self, peers: Iterable[PeerRecord]) -> None:
        """Closes channels to peers that are gone, and those that could not connect, which would try it for ever: where
        another peer has taken the port, each try is a handshake that fails. A connected one stays: its peer is there,
        whatever the swarm says."""
        while self._failed:
            await self._failed.pop().close(None)
        known = {_key(peer) for peer in peers if peer.addresses}
        for key, channel in list(self._channels.items()):
            if has_failed(channel) or (key not in known and channel.get_state() is not grpc.ChannelConnectivity.READY):
                await self._channels.pop(key).close(None)

    async def close(self) -> None:
        """Closes all of them; streams that are open end."""
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await asyncio.gather(*(channel.close(None) for channel in [*self._channels.values(), *self._failed]))


def _key(peer: PeerRecord) -> Key:
    return peer.peer_id, peer.addresses[0], peer.certificate_der
