"""Peers in this process, behind real gRPC on loopback, and a client's view of them without a DHT."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch

from client.times import Stopwatch, Times
from dht.record import PeerRecord
from peer.config import PeerConfig
from peer.gate import Entry
from peer.host import Served, SpanHost
from protocol.channel import open_channel
from protocol.credentials import Credentials
from protocol.identity import Identity
from protocol.limits import MESSAGE_BYTES, WIRE_VERSION
from protocol.messages import Open
from protocol.span import Span
from slicing import fingerprint, legal_cuts, load_config, load_span, n_blocks, resolve
from slicing.quantized import Quantization
from tensor_codecs import dtype_name, names

STOP_GRACE_S = 0.05
"""At a test's end nothing is under way that anybody waits for, and streams between hosts would cost a second each."""

_identities: list[Identity] = []
_hosts: dict[str, SpanHost] = {}  # that are open, by peer id


def identity(index: int) -> Identity:
    """Identities are slow to make; tests share them."""
    while len(_identities) <= index:
        _identities.append(Identity.ephemeral())
    return _identities[index]


def served(folder: Path) -> Served:
    source = resolve(str(folder))
    config = load_config(source)
    return Served("test", fingerprint(source), n_blocks(config), legal_cuts(config))


@asynccontextmanager
async def open_host(
    folder: Path,
    span: Span,
    index: int = 0,
    dtype: torch.dtype = torch.float32,
    entry: Entry | None = None,
    quantization: Quantization = "none",
    **settings: object,
) -> AsyncIterator[SpanHost]:
    """One peer's serving half on loopback. Its record does not say how its weights are quantised."""
    model = load_span(resolve(str(folder)), span, dtype=dtype, quantization=quantization)
    options: dict[str, object] = {
        "host": "127.0.0.1",
        "kv_tokens": 4096,
        "lan": False,
        "stop_grace_s": STOP_GRACE_S,
        **settings,
    }
    config = PeerConfig(**options)  # type: ignore[arg-type]
    async with SpanHost.open(model, served(folder), identity(index), config, find_host, entry) as host:
        host.state = "online"
        _hosts[host.identity.peer_id] = host
        try:
            yield host
        finally:
            del _hosts[host.identity.peer_id]


async def find_host(peer_id: str, useless: PeerRecord | None = None) -> PeerRecord | None:
    """What hosts know of each other."""
    return record_of(_hosts[peer_id]) if peer_id in _hosts else None


def record_of(host: SpanHost) -> PeerRecord:
    return PeerRecord(
        peer_id=host.identity.peer_id,
        fingerprint=host.served.fingerprint,
        n_blocks=host.served.n_blocks,
        span=host.model.span,
        state="online",
        addresses=(f"127.0.0.1:{host.port}",),
        certificate_der=host.identity.certificate_der,
        codecs=names(),
        dtype=dtype_name(host.model.dtype),
        wire_version=WIRE_VERSION,
        kv_tokens_left=host.sessions.tokens_left,
        kv_tokens_total=host.budget.tokens_total,
    )


@dataclass
class KnownPeers:
    """What a session needs of a swarm: a list of peers. `on_refresh` lets a test change it while a session waits."""

    records: Sequence[PeerRecord]
    on_refresh: Callable[[], None] = lambda: None
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    credentials: Credentials | None = None

    def peers(self) -> Sequence[PeerRecord]:
        return self.records

    async def refresh(self) -> None:
        self.on_refresh()

    async def approach(self, peers: Sequence[PeerRecord]) -> None:
        """There are no relays."""

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        if peer.peer_id not in self.channels:
            self.channels[peer.peer_id] = open_channel(
                peer.addresses[0], peer.certificate_der, max_message_bytes=MESSAGE_BYTES
            )
        return self.channels[peer.peer_id]

    def cuts(self) -> None:
        return None

    def times(self) -> Times:
        return self.stopwatch.snapshot()

    def signed(self, request: Open, peer: PeerRecord) -> Open:
        if self.credentials is None:
            return request
        return self.credentials.sign(request, peer.peer_id, time.time())

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close(None)
