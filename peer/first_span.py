"""How a peer comes to its first blocks: it chooses, claims, and loads them; fewer, if they do not fit after all."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence

from dht.announcer import Announcer
from dht.record import PeerRecord
from dht.view import SwarmReader
from peer import memory
from peer.claim import settle
from peer.config import PeerConfig
from peer.loading import SpanLoader
from peer.placement import choose_span, placed
from peer.standing import Standing
from protocol.errors import UserError
from protocol.span import Span
from slicing import SpanModel, check_span, load_config

UNKNOWN_BLOCKS_PER_S = 1000.0
"""What a peer is taken to compute as long as nobody has measured anything. Among equals any number would do."""


class FirstSpan:
    """The first span of a peer.

    Args:
        peer_id: this peer's; what an earlier life of it announced does not count.
        say: told, in one sentence, when it becomes a shorter span.

    Attributes:
        num_blocks: the most that the peer holds; None: the user named its blocks.
    """

    def __init__(
        self,
        config: PeerConfig,
        loader: SpanLoader,
        reader: SwarmReader,
        peer_id: str,
        rng: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self.num_blocks = config.num_blocks
        self._config = config
        self._loader = loader
        self._reader = reader
        self._peer_id = peer_id
        self._rng = rng
        self._say = say

    async def choose(self) -> Span:
        """The blocks to claim.

        Raises:
            IllegalCut: the named ones are not blocks of this model, or it cannot be cut there.
            ConfigError: the model cannot be cut into so few blocks.
            UserError: not even the shortest span fits into memory.
        """
        if self._config.span is not None:
            check_span(await asyncio.to_thread(load_config, self._loader.source), self._config.span)
            return self._config.span
        if self.num_blocks is None:
            self.num_blocks = await asyncio.to_thread(self._loader.num_blocks)
        return self._weakest(self._reader.view.peers(self._loader.served.fingerprint))

    async def load(self, standing: Standing, announcer: Announcer) -> SpanModel:
        """The blocks that `standing` claims, or that it comes to claim instead, loaded.

        Raises:
            UserError: not even the shortest span fits into memory, or the files are missing or damaged.
        """
        while True:
            if self.num_blocks is not None:
                await settle(standing, announcer, self._reader, self._weakest, self._rng)
            try:
                return await self._loader.load(standing.span)
            except MemoryError:
                fewer = self._fewer(standing.span)
            # Only now, outside of the handler, nothing refers to the half that was loaded.
            await asyncio.to_thread(memory.give_back_weights)
            self._say(f"blocks {standing.span} do not fit into memory; trying {fewer}")
            self.num_blocks = fewer
            standing.claim(self._weakest(self._reader.view.peers(self._loader.served.fingerprint)))
            await announcer.announce()

    def _weakest(self, peers: Sequence[PeerRecord]) -> Span:
        """Where the swarm needs this peer most."""
        assert self.num_blocks is not None
        served = self._loader.served
        others = [peer for peer in peers if peer.peer_id != self._peer_id]
        known = [peer.blocks_per_s for peer in placed(others, prior_blocks_per_s=0.0) if peer.blocks_per_s]
        speed = statistics.median(known) if known else UNKNOWN_BLOCKS_PER_S
        others_placed = placed(others, prior_blocks_per_s=speed)
        return choose_span(served.n_blocks, served.legal_cuts, others_placed, self.num_blocks, speed)

    def _fewer(self, span: Span) -> int:
        fewer = memory.fewer_blocks(len(span), self._loader.served.legal_cuts)
        free = memory.in_mib(memory.free_bytes(self._loader.device))
        if self.num_blocks is None:
            raise UserError(
                f"blocks {span} do not fit into the {free} of memory that are free; name fewer with --blocks"
            )
        if fewer is None:
            raise UserError(f"not even blocks {span} fit into the {free} of memory that are free; free some")
        return fewer
