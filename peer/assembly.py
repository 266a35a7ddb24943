"""Puts a peer together in a swarm that it has joined: chooses and loads blocks, opens the port, announces, serves.

Importing this module imports torch and transformers; `peer.server`, which needs neither, does it beside other work.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dht.announcer import REFUSED, Announcer, announcing
from dht.background import background
from dht.config import DhtConfig
from dht.locate import Located
from dht.maddr import Maddr
from dht.node import SwarmNode
from dht.presence import findable
from dht.record import ModelRecord, PeerRecord
from dht.view import SwarmReader
from peer.balance import Balance
from peer.config import PeerConfig
from peer.finder import Finder
from peer.first_span import FirstSpan
from peer.gate import PEER, Lists
from peer.host import Served, SpanHost
from peer.hosting import Hosting
from peer.link import Resolve
from peer.loading import SpanLoader
from peer.metrics import serving_metrics
from peer.neighbours import Neighbours
from peer.placement import MovePolicy
from peer.reach.whereabouts import Around, keeping_track
from peer.server import Joined
from peer.standing import Standing
from protocol.errors import UnknownModel, WrongModel
from protocol.identity import Identity
from slicing import ModelSource, Progress, fingerprint, legal_cuts, load_config, n_blocks, resolve
from slicing.source import find_here

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "potluck-demo"


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer, for whoever shows it."""

    node: SwarmNode
    announcer: Announcer
    standing: Standing
    found: Located | None  # None: it started a swarm of its own

    @property
    def host(self) -> SpanHost:
        """What serves now."""
        assert self.standing.host is not None, "between two spans there is no host"
        return self.standing.host

    @property
    def join(self) -> str:
        """Through which node others join: this one, or, where nobody can dial it, one through which it did itself."""
        through = () if self.found is None else self.found.maddrs
        own = self.node.maddrs
        return next(iter((*own, *through) if self.record().direct else (*through, *own)))

    def record(self) -> PeerRecord:
        """What it says of itself now."""
        return self.standing.record()

    async def leave(self, drain_s: float, say: Callable[[str], None] = logger.info) -> None:
        """Takes no new sessions from now on, tells the swarm, and waits until those that there are have gone on
        elsewhere, `drain_s` at most. What remains is done when the peer is closed."""
        self.standing.leave()
        host = self.standing.host
        if host is not None:
            host.drain()
        await self.announcer.announce()
        if host is None or not host.holding_up:
            return
        say(f"{_sessions(host.holding_up)} being handed over, {drain_s:g} s at most; once more to leave at once")
        if left := await host.drained(drain_s):
            say(f"leaving although {_sessions(left)} still here")


def _sessions(number: int) -> str:
    return "1 session is" if number == 1 else f"{number} sessions are"


def prepare(config: PeerConfig) -> tuple[ModelSource, Served] | None:
    """What can be known, and imported, of the model while nobody has seen the swarm. Blocks.

    Returns:
        where the named model is, or the embedded one, which is likely where none was named; None: it is not on this
        machine.

    Raises:
        UserError: the named model cannot be used.
    """
    try:
        source = find_here(config.model or EMBEDDED_MODEL)
    except UnknownModel:
        if config.model is not None:
            raise
        return None  # which is an error only if the swarm does not say what else to serve
    return None if source is None else (source, _served(source))


@asynccontextmanager
async def assembled(
    joined: Joined,
    config: PeerConfig,
    dht_config: DhtConfig,
    known: tuple[ModelSource, Served] | None,
    progress: Progress | None,
    say: Callable[[str], None],
) -> AsyncIterator[Peer]:
    """What `peer.server.open_peer` gives, once it has joined a swarm.

    Args:
        known: what `prepare` found.

    Raises:
        UserError: as `open_peer`.
    """
    rng = random.Random()
    identity, node, reader, entry = joined.identity, joined.node, joined.reader, joined.entry
    async with AsyncExitStack() as stack:
        source, served = await _choose_model(config, reader, known)
        reader.watch(served.fingerprint)
        loader = await asyncio.to_thread(SpanLoader.choose, config, source, served, progress)
        first = FirstSpan(config, loader, reader, identity.peer_id, rng, say)
        standing = Standing(identity, served, await first.choose(), config, partial(_hosts, config, node))
        if config.metrics_port is not None:
            url = await stack.enter_async_context(serving_metrics(standing, config.metrics_host, config.metrics_port))
            say(f"metrics at {url}")
        announcer = await stack.enter_async_context(announcing(node, standing.record, _listing(identity, served)))
        if node.is_refused:
            say(REFUSED)
        await stack.enter_async_context(findable(node, dht_config, "peer"))
        balance = Balance(standing, served, reader, _policy(config), rng)
        neighbours = Neighbours(identity.peer_id, lambda: standing.span, lambda: reader.view.online(served.fingerprint))
        await stack.enter_async_context(background(neighbours.run(), "neighbours"))
        standing.rtts_ms = neighbours.rtts_ms
        around = Around(
            hosts=partial(_hosts, config, node),
            peers=lambda: [peer for peers in reader.view.peers_by_model.values() for peer in peers],
            port=lambda: standing.port,
            host=lambda: standing.host,
            announce=announcer.announce,
            set_dialable=node.set_dialable,
            say=say,
        )
        whereabouts = await stack.enter_async_context(keeping_track(identity, config, around))
        standing.place, standing.relay = whereabouts.place, whereabouts.relay
        find = _permitted(Finder(reader).find, entry.lists)
        open_host = partial(SpanHost.open, served=served, identity=identity, config=config, resolve=find, entry=entry)
        hosting = Hosting(standing, announcer, loader, first, balance, open_host, config.drain_s, rng, say)
        await stack.enter_async_context(background(hosting.run(), "hosting"))
        await hosting.ready.wait()
        await whereabouts.known.wait()
        yield Peer(node, announcer, standing, joined.found)


async def _choose_model(
    config: PeerConfig, reader: SwarmReader, known: tuple[ModelSource, Served] | None
) -> tuple[ModelSource, Served]:
    """The model to serve: the named one, else the swarm's only one, else the embedded one.

    Raises:
        UnknownModel: none was named, and the swarm has several; or the name leads nowhere on this machine.
        WrongModel: the swarm serves another model under that name.
    """
    names_here = sorted({model.name for model in reader.view.models})
    if config.model is None and len(names_here) > 1:
        raise UnknownModel(f"this swarm serves {', '.join(names_here)}; name one of them with --model")
    name = config.model or (names_here[0] if names_here else EMBEDDED_MODEL)
    if known is not None and known[0].name == name:
        source, served = known
    else:
        try:
            source = await asyncio.to_thread(resolve, name)
        except UnknownModel as error:
            if config.model is not None:
                raise
            raise UnknownModel(
                f"this swarm serves {name!r}, which is not on this machine or on the hub; say where it is with --model"
            ) from error
        served = await asyncio.to_thread(_served, source)
    others = reader.view.named(served.model)
    if others and served.fingerprint not in {model.fingerprint for model in others}:
        raise WrongModel(f"this swarm serves another model under the name {served.model!r}; use the same files")
    return source, served


def _permitted(find: Resolve, lists: Lists) -> Resolve:
    """As `find`, for peers to which this one may push; to others, clients carry results themselves."""

    async def found(peer_id: str, useless: PeerRecord | None = None) -> PeerRecord | None:
        return await find(peer_id, useless) if lists.permit(peer_id, PEER) else None

    return found


def _served(source: ModelSource) -> Served:
    config = load_config(source)
    name = source.name if source.revision is not None else Path(source.name).name
    return Served(name, fingerprint(source), n_blocks(config), legal_cuts(config))


def _listing(identity: Identity, served: Served) -> ModelRecord:
    return ModelRecord(
        signer=identity.peer_id,
        name=served.model,
        fingerprint=served.fingerprint,
        n_blocks=served.n_blocks,
        cuts=() if len(served.legal_cuts) == served.n_blocks + 1 else served.legal_cuts[1:-1],
    )


def _policy(config: PeerConfig) -> MovePolicy:
    """The policy of moves; looks as often as the user says, also where it would look more seldom or more often."""
    if config.balance_every_s is None:
        return MovePolicy()
    return MovePolicy(check_every_s=config.balance_every_s, gap_check_every_s=config.balance_every_s)


def _hosts(config: PeerConfig, node: SwarmNode) -> list[str]:
    """Where others reach this machine: the announced host, else those under which the DHT node is reached."""
    if config.announce_host is not None:
        return [config.announce_host]
    maddrs = [Maddr.require(text) for text in node.maddrs]
    return list(dict.fromkeys(maddr.host for maddr in maddrs))
