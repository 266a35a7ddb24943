"""A bootstrap node: it serves no blocks, but is there for others to join through, at an address that stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from dht import known_peers
from dht.config import DhtConfig
from dht.maddr import Maddr
from dht.node import SwarmNode, open_node
from dht.presence import findable
from dht.probe import reachable
from dht.view import SwarmReader
from protocol.identity import claim_identity
from protocol.join_token import read_join_token

log = logging.getLogger(__name__)

FOLDER = "bootstrap"


async def run_bootstrap(config: DhtConfig, on_ready: Callable[[SwarmNode], None]) -> None:
    """Run a bootstrap node until cancelled. Its identity and port are kept, so its address survives restarts.

    Joins `config.join`, else nodes that it knows from earlier, so that its restart does not split the swarm; alone, it
    is the first node of a new one. Reads the swarm now and then, to know nodes to come back through.

    Raises:
        ConfigError: the port is taken, the folder cannot be written, or an address or the join token is malformed.
        SwarmNotFound: no node of `config.join` answers.
    """
    async with contextlib.AsyncExitStack() as stack:
        identity = await asyncio.to_thread(stack.enter_context, claim_identity(config.home_folder / FOLDER))
        token = await asyncio.to_thread(read_join_token, config.join_token)
        initial = await _initial_peers(config, identity.peer_id, "" if token is None else token.name)
        node = await stack.enter_async_context(open_node(config, identity, initial))
        await stack.enter_async_context(findable(node, config, "bootstrap"))
        on_ready(node)
        await SwarmReader(node).run()


async def _initial_peers(config: DhtConfig, own_peer_id: str, swarm: str) -> tuple[str, ...]:
    if config.join or config.new_swarm:
        return config.join
    known = [Maddr.require(text) for text in await asyncio.to_thread(known_peers.load, config.home_folder, swarm)]
    return await reachable((str(maddr) for maddr in known if maddr.peer_id != own_peer_id), config.probe_timeout_s)
