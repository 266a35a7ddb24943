"""A peer, from the search for its swarm to its end. What computes is imported while the swarm is joined: both take a
second or two, of which joining mostly waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dht.config import DhtConfig
from dht.locate import Located, locate_swarm
from dht.node import SwarmNode, open_node
from dht.view import SwarmReader, reading
from peer.config import PeerConfig
from peer.gate import Entry
from protocol.command import importing
from protocol.errors import SwarmNotFound
from protocol.identity import Identity, claim_identity

if TYPE_CHECKING:
    from peer.assembly import Peer
    from peer.host import Served
    from slicing import ModelSource, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joined:
    """This peer in its swarm, before it serves anything. `found`: None, if it started the swarm itself."""

    identity: Identity
    node: SwarmNode
    reader: SwarmReader
    entry: Entry
    found: Located | None


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
        UserError: the model, the blocks, the port, the memory or the swarm cannot be used; each says what to do.
    """
    entry = await asyncio.to_thread(Entry.read, dht_config.join_token, config.allow, config.deny)
    async with AsyncExitStack() as stack:
        preparing = asyncio.create_task(asyncio.to_thread(_prepare, config), name="preparing")
        preparing.add_done_callback(_looked_at)
        stack.callback(preparing.cancel)
        identity = await asyncio.to_thread(stack.enter_context, claim_identity(dht_config.home_folder))
        found = await _locate(dht_config)
        node, found = await _enter_swarm(stack, dht_config, identity, found)
        say("started a new swarm" if found is None else f"joined a swarm through {found.how}")
        reader = await stack.enter_async_context(reading(node))
        known = await preparing

        from peer.assembly import assembled

        joined = Joined(identity, node, reader, entry, found)
        yield await stack.enter_async_context(assembled(joined, config, dht_config, known, progress, say))


def _prepare(config: PeerConfig) -> tuple[ModelSource, Served] | None:
    with importing():
        from peer.assembly import prepare

        return prepare(config)


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Should joining fail, too, only that is told."""
    if not task.cancelled():
        task.exception()


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
