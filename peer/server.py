"""Puts a peer together: find the swarm, choose and load the blocks, open the port, announce, serve, leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from dht.announcer import Announcer, announcing
from dht.background import background
from dht.config import DhtConfig
from dht.locate import Located, locate_swarm
from dht.maddr import Maddr
from dht.node import SwarmNode, open_node
from dht.presence import findable
from dht.record import ModelRecord, PeerRecord
from dht.view import SwarmReader, reading
from peer import memory
from peer.config import PeerConfig
from peer.host import SOFTWARE, Served, SpanHost
from peer.neighbours import Neighbours
from peer.placement import choose_span
from protocol.errors import ConfigError, SwarmNotFound, UnknownModel, WrongModel
from protocol.identity import Identity, claim_identity
from protocol.limits import WIRE_VERSION
from protocol.span import Span
from slicing import (
    ModelSource,
    Progress,
    SpanModel,
    block_digests,
    check_span,
    fingerprint,
    legal_cuts,
    load_config,
    load_span,
    n_blocks,
    resolve,
)
from tensor_codecs import dtype_name, names

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "potluck-demo"


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer, for whoever shows it."""

    host: SpanHost
    node: SwarmNode
    announcer: Announcer
    record: Callable[[], PeerRecord]
    found: Located | None  # None: it started a swarm of its own

    async def drain(self) -> None:
        """Takes no new sessions from now on, and tells the swarm."""
        self.host.drain()
        await self.announcer.announce()


@asynccontextmanager
async def open_peer(
    config: PeerConfig,
    dht_config: DhtConfig,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = logger.info,
) -> AsyncIterator[Peer]:
    """A peer that serves while the body runs, and leaves the swarm properly afterwards.

    Args:
        progress: told as weights are read.
        say: told, in one sentence each, what was found and chosen.

    Raises:
        UserError: the model, the blocks, the port or the swarm cannot be used; each says what to do.
    """
    async with AsyncExitStack() as stack:
        identity = await asyncio.to_thread(stack.enter_context, claim_identity(dht_config.home_folder))
        found = await _locate(dht_config)
        node, found = await _enter_swarm(stack, dht_config, identity, found)
        say("started a new swarm" if found is None else f"joined a swarm through {found.how}")
        reader = await stack.enter_async_context(reading(node))
        source, served = await _choose_model(config, reader)
        span = await _choose_span(config, source, served, reader)
        model = await asyncio.to_thread(_load, config, source, span, progress)
        say(str(model.report))
        host = await stack.enter_async_context(SpanHost.open(model, served, identity, config))
        digests = await asyncio.to_thread(block_digests, model)
        neighbours = Neighbours(
            identity.peer_id, lambda: host.model.span, lambda: reader.view.online(served.fingerprint)
        )
        await stack.enter_async_context(background(neighbours.run(), "neighbours"))
        record = _Describe(host, config, node, neighbours, tuple(bytes.fromhex(digests[b]) for b in sorted(digests)))
        listing = ModelRecord(
            signer=identity.peer_id,
            name=served.model,
            fingerprint=served.fingerprint,
            n_blocks=served.n_blocks,
            cuts=() if len(served.legal_cuts) == served.n_blocks + 1 else served.legal_cuts[1:-1],
        )
        host.state = "online"
        announcer = await stack.enter_async_context(announcing(node, record, listing))
        await stack.enter_async_context(findable(node, dht_config, "peer"))
        yield Peer(host, node, announcer, record, found)


async def _locate(config: DhtConfig) -> Located | None:
    """The swarm to join; None where there is none, so that this peer starts one."""
    try:
        found = await locate_swarm(config)
        return found if found.maddrs else None
    except SwarmNotFound:
        if config.join:
            raise
        return None


async def _enter_swarm(
    stack: AsyncExitStack, config: DhtConfig, identity: Identity, found: Located | None
) -> tuple[SwarmNode, Located | None]:
    """A node of the swarm that was found; of a new one, if what was found by chance does not answer after all."""
    if found is not None:
        try:
            return await stack.enter_async_context(open_node(config, identity, found.maddrs)), found
        except SwarmNotFound as error:
            if config.join:
                raise
            logger.warning("%s", error)
    return await stack.enter_async_context(open_node(config, identity)), None


async def _choose_model(config: PeerConfig, reader: SwarmReader) -> tuple[ModelSource, Served]:
    """The model to serve: the named one, else the swarm's only one, else the embedded one.

    Raises:
        UnknownModel: none was named, and the swarm has several; or the name leads nowhere on this machine.
        WrongModel: the swarm serves another model under that name.
    """
    names_here = sorted({model.name for model in reader.view.models})
    if config.model is None and len(names_here) > 1:
        raise UnknownModel(f"this swarm serves {', '.join(names_here)}; name one of them with --model")
    name = config.model or (names_here[0] if names_here else EMBEDDED_MODEL)
    try:
        source = await asyncio.to_thread(resolve, name)
    except UnknownModel as error:
        if config.model is not None:
            raise
        raise UnknownModel(
            f"this swarm serves {name!r}, which is not on this machine or on the hub; say where it is with --model"
        ) from error
    served = await asyncio.to_thread(_served, source)
    known = reader.view.named(served.model)
    if known and served.fingerprint not in {model.fingerprint for model in known}:
        raise WrongModel(f"this swarm serves another model under the name {served.model!r}; use the same files")
    return source, served


def _served(source: ModelSource) -> Served:
    config = load_config(source)
    name = source.name if source.revision is not None else Path(source.name).name
    return Served(name, fingerprint(source), n_blocks(config), legal_cuts(config))


async def _choose_span(config: PeerConfig, source: ModelSource, served: Served, reader: SwarmReader) -> Span:
    """The blocks to serve.

    Raises:
        IllegalCut: the named ones are not blocks of this model, or it cannot be cut there.
        ConfigError: the model cannot be cut into so few blocks.
    """
    if config.span is not None:
        check_span(await asyncio.to_thread(load_config, source), config.span)
        return config.span
    wanted = config.num_blocks
    if wanted is None:
        per_block = await asyncio.to_thread(memory.checkpoint_bytes, source) // served.n_blocks
        wanted = memory.blocks_that_fit(memory.free_bytes(_device(config)), per_block, served.n_blocks)
    spans = [peer.span for peer in reader.view.peers(served.fingerprint)]
    return choose_span(served.n_blocks, served.legal_cuts, spans, wanted)


def _device(config: PeerConfig) -> torch.device:
    """The device to compute on.

    Raises:
        ConfigError: there is no such device here.
    """
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {reason}") from error
    return device


def _load(config: PeerConfig, source: ModelSource, span: Span, progress: Progress | None) -> SpanModel:
    device = _device(config)
    dtype: torch.dtype | None
    if config.dtype != "auto":
        dtype = cast(torch.dtype, getattr(torch, config.dtype))
    else:
        dtype = torch.float32 if device.type == "cpu" else None
    return load_span(source, span, dtype=dtype, device=device, progress=progress)


class _Describe:
    """Makes the peer's present record; called about once a second."""

    def __init__(
        self, host: SpanHost, config: PeerConfig, node: SwarmNode, neighbours: Neighbours, digests: tuple[bytes, ...]
    ) -> None:
        self._host = host
        self._neighbours = neighbours
        self._template = PeerRecord(
            peer_id=host.identity.peer_id,
            fingerprint=host.served.fingerprint,
            n_blocks=host.served.n_blocks,
            span=host.model.span,
            state="joining",
            addresses=_addresses(host, config, node),
            certificate_der=host.identity.certificate_der,
            block_digests=digests,
            kv_tokens_total=host.budget.tokens_total,
            codecs=names(),
            dtype=dtype_name(host.model.dtype),
            software=SOFTWARE,
            wire_version=WIRE_VERSION,
            public_name=config.public_name or "",
            started_at=time.time(),
        )

    def __call__(self) -> PeerRecord:
        host = self._host
        step_ms = host.step_ms
        return replace(
            self._template,
            state=host.state,
            step_ms=step_ms,
            tokens_per_s=None if not step_ms else 1000.0 / step_ms,
            rtts_ms=self._neighbours.rtts_ms(),
            kv_tokens_left=host.budget.tokens_left,
        )


def _addresses(host: SpanHost, config: PeerConfig, node: SwarmNode) -> tuple[str, ...]:
    """Where others reach the gRPC port: the announced host, else those under which the DHT node is reached."""
    if config.announce_host is not None:
        hosts = [config.announce_host]
    else:
        maddrs = [Maddr.require(text) for text in node.maddrs]
        hosts = list(dict.fromkeys(maddr.host for maddr in maddrs))
    return tuple(f"[{h}]:{host.port}" if ":" in h else f"{h}:{host.port}" for h in hosts[:8])
