"""Letting others find a node without being told: on this machine by a state file, on the local network by mDNS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from dht import lan, local_swarm

if TYPE_CHECKING:
    from dht.config import DhtConfig
    from dht.node import SwarmNode

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def findable(node: SwarmNode, config: DhtConfig, role: local_swarm.Role) -> AsyncIterator[None]:
    """As far as `config` allows, others find `node` while the body runs. What fails here is logged: it still serves."""
    async with contextlib.AsyncExitStack() as stack:
        if config.local:
            state = local_swarm.published(config.home_folder, node.maddrs, role, node.swarm)
            try:
                await asyncio.to_thread(stack.enter_context, state)
            except OSError as error:
                log.warning("others on this machine will not find this node: %s", error)
        if config.lan and not config.is_loopback:
            await stack.enter_async_context(lan.advertised(node.maddrs, config.lan_timeout_s, node.swarm))
        yield
