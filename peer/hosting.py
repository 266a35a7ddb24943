"""The life of a span on this peer: it is opened, announced, served; and given up for another one, where a move pays.

One task runs all of it, so that a host is closed by whoever opened it. While a span moves, the identity, the node of
the DHT and the announcements go on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from dht.announcer import Announcer
from peer import memory
from peer.balance import Balance
from peer.claim import PAUSE_S
from peer.first_span import FirstSpan
from peer.host import SpanHost
from peer.loading import SpanLoader
from peer.standing import Standing
from protocol.errors import PotluckError
from protocol.span import Span
from slicing import SpanModel, block_digests

logger = logging.getLogger(__name__)

RETRY_S = 30.0  # between attempts to load anything, when neither the new blocks nor the old ones can be


class OpenHost(Protocol):
    """`SpanHost.open` for one peer."""

    def __call__(self, model: SpanModel, *, last_port: int) -> AbstractAsyncContextManager[SpanHost]: ...


@dataclass(frozen=True, slots=True)
class _Move:
    """A move for which the host may be closed. `model`: what is served next, if there was room to load it before."""

    target: Span
    model: SpanModel | None


class Hosting:
    """Serves a span, and others after it.

    Args:
        first: chooses and loads the first span.
        open_host: makes what serves a span, at the port of the last one where there is a choice.
        drain_s: so long sessions get to go on elsewhere before a move.
        balance: says when to move; not asked if the user named the blocks.
        say: told, in one sentence each, of moves.

    Attributes:
        ready: set once the first span is served and announced.
    """

    def __init__(
        self,
        standing: Standing,
        announcer: Announcer,
        loader: SpanLoader,
        first: FirstSpan,
        balance: Balance,
        open_host: OpenHost,
        drain_s: float,
        rng: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self.ready = asyncio.Event()
        self._standing = standing
        self._announcer = announcer
        self._loader = loader
        self._first = first
        self._balance = balance
        self._open_host = open_host
        self._drain_s = drain_s
        self._rng = rng
        self._say = say
        self._port = 0
        self._digests: dict[int, str] = {}
        self._model: SpanModel | None = None  # held here alone, so that moving can let go of it

    async def run(self) -> None:
        """Serves the first span, then whatever a move brings, for ever.

        Raises:
            UserError: no span could be loaded to begin with; or the port cannot be had.
        """
        self._model = await self._first.load(self._standing, self._announcer)
        self._say(str(self._model.report))
        while True:
            before = self._standing.span
            move = await self._serve()
            self._model = move.model or await self._load_alone(move.target)
            del move
            self._standing.closed()
            await asyncio.to_thread(memory.give_back_weights)
            if self._model.span != before:
                self._standing.moves += 1
                self._say(f"moved from blocks {before} to {self._model.span}: {self._model.report}")

    async def _serve(self) -> _Move:
        """Serves until there is a move, for which everything is ready."""
        model = self._model
        assert model is not None
        self._digests = await asyncio.to_thread(block_digests, model, self._digests)
        async with self._open_host(model, last_port=self._port) as serving:
            self._port = serving.port
            self._standing.serve(serving, self._digests)
            await self._resume(serving)
            self.ready.set()
            if self._first.num_blocks is None:
                await asyncio.Event().wait()  # pinned
            return await self._next_move(self._balance, serving)

    async def _next_move(self, balance: Balance, host: SpanHost) -> _Move:
        """Waits for a move that pays, and makes everything ready for it. Whatever comes between, `host` serves on."""
        num_blocks = self._first.num_blocks
        assert num_blocks is not None
        balance.arrived()
        while True:
            target = await balance.due(num_blocks)
            self._standing.moving_to = target
            await self._announcer.announce()
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))  # for the claims of others to arrive
            if await balance.still_due(target):
                try:
                    model = await self._load_beside(host.model, target)
                except (MemoryError, PotluckError, OSError) as error:
                    self._say(f"blocks {target} could not be loaded, {host.model.span} are served on: {error}")
                    balance.rest()
                else:
                    if await self._drained(balance, host, target):
                        return _Move(target, model)
                    model = None
            await asyncio.to_thread(memory.give_back_weights)
            self._standing.resume()
            await self._resume(host)

    async def _drained(self, balance: Balance, host: SpanHost, target: Span) -> bool:
        """Sends the sessions elsewhere. Is the move still right before and after that? Loading and draining take time,
        in which the swarm may have become another."""
        if not await balance.still_due(target):
            return False
        logger.info("blocks %s need this peer more than %s; draining", target, host.model.span)
        self._standing.drain()
        host.drain()
        await self._announcer.announce()
        await host.drained(self._drain_s)
        return await balance.still_due(target)

    async def _resume(self, host: SpanHost) -> None:
        """The host takes sessions, unless this peer is leaving; the swarm is told."""
        if self._standing.leaving:
            host.drain()
        else:
            host.resume()
        await self._announcer.announce()

    async def _load_beside(self, model: SpanModel, target: Span) -> SpanModel | None:
        """The blocks `target`, while `model` serves on; None: there is no room for both."""
        if not await asyncio.to_thread(self._loader.fits_beside, target, model.span):
            return None
        return await self._loader.load(target, model)

    async def _load_alone(self, target: Span) -> SpanModel:
        """The blocks `target`, where they and the old ones do not fit into memory together; should that fail, the old
        ones, or the part of both that is still there."""
        old, self._model = self._model, None
        assert old is not None
        before, kept = old.span, old.span.overlap(target)
        self._standing.claim(target)
        await self._announcer.announce()
        try:
            rest = None if kept is None else await self._loader.load(kept, old)
        except (MemoryError, PotluckError, OSError) as error:
            self._say(f"blocks {target} could not be loaded: {error}")
            return old
        self._digests = {} if rest is None else {block: self._digests[block] for block in rest.blocks}
        del old
        while True:
            for span in (target, before):
                await asyncio.to_thread(memory.give_back_weights)
                try:
                    return await self._loader.load(span, rest)
                except (MemoryError, PotluckError, OSError) as error:
                    self._say(f"blocks {span} could not be loaded: {error}")
            if rest is not None:
                return rest
            await asyncio.sleep(RETRY_S)
