"""`doctor`: does what a peer does before it serves, and says what is in the way. Changes nothing, announces nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import grpc.aio
import psutil

from dht import ports
from dht.config import DhtConfig
from dht.locate import Located, locate_swarm
from dht.node import MAX_CLOCK_SKEW_S, SwarmNode, open_node
from dht.record import PeerRecord
from dht.view import SwarmReader
from peer import findings
from peer.config import PeerConfig
from peer.findings import Finding
from peer.reach.dialback import answers, ask
from peer.reach.moorings import Moorings
from peer.reach.relay import Relay, RelaySettings, open_relay
from peer.reach.verdict import helpers, settle
from peer.reach.whereabouts import announced_ips, own_end
from protocol.channel import server_credentials, server_options
from protocol.errors import ClockOff, ConfigError, SwarmNotFound
from protocol.hosts import address, ip
from protocol.identity import Identity
from protocol.limits import MESSAGE_BYTES
from protocol.relay_frames import End

TIE_TIMEOUT_S = 8.0


async def examine(config: PeerConfig, dht_config: DhtConfig) -> list[Finding]:
    """All findings, in the order in which a person wants to read them."""
    own = own_hosts()
    found = [findings.addresses(own), *_ports(config, dht_config), _memory(), await asyncio.to_thread(_gpu, config)]
    async with AsyncExitStack() as stack:
        try:
            located = await locate_swarm(dht_config)
            node = await stack.enter_async_context(open_node(dht_config, None, located.maddrs))
        except ClockOff as error:
            return [*found, Finding("clock", "fault", error.message, "set it, e.g. `timedatectl set-ntp true`")]
        except SwarmNotFound as error:
            if dht_config.join:
                remedy = "ask whoever runs the swarm for an address that works now"
                return [*found, Finding("DHT", "fault", error.message, remedy)]
            return [*found, findings.directory(None, 0, 0)]
        return [*found, *await _in_swarm(stack, config, node, located, own)]


async def _in_swarm(
    stack: AsyncExitStack, config: PeerConfig, node: SwarmNode, located: Located, own: Sequence[str]
) -> list[Finding]:
    """What only others can say."""
    peers = await _peers(node)
    found = [
        findings.directory(located.how if located.maddrs else None, node.neighbours, len(peers)),
        findings.clock(node.clock_offset_s, MAX_CLOCK_SKEW_S),
    ]
    identity = await asyncio.to_thread(Identity.ephemeral)
    try:
        port = await stack.enter_async_context(_listening(config, identity))
        relay = await _relay(stack, config, identity, port)
    except ConfigError:  # which was found before
        return found
    shown = config.announce_port or port
    relay_port = 0 if relay is None else config.relay_announce_port or relay.port
    asked = helpers(peers, identity.peer_id, random.Random())
    said = await ask(asked, identity.certificate_der, [shown, relay_port] if relay_port else [shown])
    plausible = [config.announce_host] if config.announce_host is not None else list(own)
    position = settle(said, shown, relay_port, plausible, await announced_ips(config.announce_host))
    works, why_not = None, ""
    if position.needs_relay:
        works, why_not = await _through_relay(identity, peers, own_end(config.host, port))
    offered = sum(1 for peer in peers if peer.relay_port and peer.relay_places and peer.direct)
    return [
        *found,
        findings.nat(position, own),
        *findings.reach(position, shown, len(asked)),
        findings.relay(position, offered, works, why_not),
    ]


def _ports(config: PeerConfig, dht_config: DhtConfig) -> list[Finding]:
    wanted = [("port", config.port), ("dht-port", dht_config.port)]
    wanted += [("relay-port", config.relay_port)] if config.relay else []
    return [findings.port(name, number, _taken(config.host, number)) for name, number in wanted]


def _taken(host: str, port: int) -> str | None:
    try:
        ports.bind(host, port)
    except ConfigError as error:
        return error.message
    return None


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return findings.memory(memory.available, memory.total)


def _gpu(config: PeerConfig) -> Finding:
    import torch

    named = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        named.append(
            f"{torch.cuda.get_device_name(i)}: {free / findings.GIB:.1f} GiB of {total / findings.GIB:.1f} are free"
        )
    return findings.gpu(named, config.device, config.threads or os.cpu_count() or 1)


def own_hosts() -> list[str]:
    """The IP addresses of this machine's interfaces, link-local ones left out."""
    found = [ip(each.address) for interface in psutil.net_if_addrs().values() for each in interface]
    return [str(own) for own in found if own is not None and not own.is_link_local]


async def _peers(node: SwarmNode) -> list[PeerRecord]:
    reader = SwarmReader(node)
    for _ in range(2):  # which models there are, and then their peers
        await reader.refresh()
    return [peer for peers in reader.view.peers_by_model.values() for peer in peers]


@contextlib.asynccontextmanager
async def _listening(config: PeerConfig, identity: Identity) -> AsyncIterator[int]:
    """A port at which somebody answers with that identity's certificate, and says nothing else."""
    server = grpc.aio.server(options=server_options(MESSAGE_BYTES))
    at = address(config.host, config.port)
    try:
        port = server.add_secure_port(at, server_credentials(identity))
    except RuntimeError as error:
        raise ConfigError(f"cannot listen at {at}") from error
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def _relay(stack: AsyncExitStack, config: PeerConfig, identity: Identity, port: int) -> Relay | None:
    if not config.relay:
        return None
    settings = RelaySettings(config.host, config.relay_port, config.relay_mbps, lambda: own_end(config.host, port))
    return await stack.enter_async_context(open_relay(identity.peer_id, settings))


async def _through_relay(identity: Identity, peers: Sequence[PeerRecord], target: End) -> tuple[str | None, str]:
    """Ties itself to a relay, and calls itself through it: the address at which that worked, or why it did not."""
    changed = asyncio.Event()
    moorings = Moorings(identity, lambda: peers, lambda: target, changed.set)
    tying = asyncio.create_task(moorings.run(), name="doctor-moorings")
    try:
        async with asyncio.timeout(TIE_TIMEOUT_S):
            while not moorings.addresses:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return None, f"no relay took this machine within {TIE_TIMEOUT_S:g} s"
    else:
        at = moorings.addresses[0]
        if await answers(at, identity.certificate_der):
            return at, ""
        return None, f"the relay at {at} took this machine, but leads nobody to it"
    finally:
        tying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tying
