"""How peers come to their first blocks, and where they go later: real claims, readers, announcers; no network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch

from dht.announcer import announcing
from dht.config import DhtConfig
from dht.record import PeerRecord
from dht.view import SwarmReader
from peer.balance import Balance
from peer.config import PeerConfig
from peer.first_span import FirstSpan
from peer.host import Served
from peer.loading import SpanLoader
from peer.placement import MovePolicy
from peer.standing import Standing
from protocol.errors import ConfigError, UserError
from protocol.span import Span
from slicing import ModelSource, SpanModel, resolve
from tests.dht.support import MODEL, FakeNode, identity, peer

N_BLOCKS = 6
SERVED = Served("test/model", MODEL, N_BLOCKS, tuple(range(N_BLOCKS + 1)))
HASTE = MovePolicy(check_every_s=0.05, gap_check_every_s=0.05)


@dataclass
class Loader:
    """A `SpanLoader` with room for `fits` blocks."""

    fits: int = N_BLOCKS
    thinks: int = N_BLOCKS  # fit
    served: Served = SERVED
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    source: ModelSource = field(default_factory=lambda: resolve("potluck-demo"))
    loaded: list[Span] = field(default_factory=list)

    def num_blocks(self) -> int:
        return self.thinks

    async def load(self, span: Span, old: SpanModel | None = None) -> Span:
        self.loaded.append(span)
        if len(span) > self.fits:
            raise MemoryError
        return span


class Newcomer:
    """A peer that is on its way into the swarm of `contents`."""

    def __init__(self, index: int, contents: dict[str, dict[str, bytes]], loader: Loader, **settings: Any) -> None:
        self.node = FakeNode(DhtConfig(), identity(index))
        self.node.contents = contents
        self.reader = SwarmReader(cast(Any, self.node), [MODEL])
        self.said: list[str] = []
        self._config = PeerConfig(**settings)
        self.first = FirstSpan(
            self._config, cast(SpanLoader, loader), self.reader, identity(index).peer_id, random.Random(index),
            self.said.append,
        )  # fmt: skip

    async def arrive(self) -> Span:
        """What it comes to serve."""
        await self.reader.refresh()
        async with self._announced():
            return cast(Span, await self.first.load(self.standing, self.announcer))

    @asynccontextmanager
    async def _announced(self) -> AsyncIterator[None]:
        who = self.node.identity
        assert who is not None
        self.standing = Standing(who, SERVED, await self.first.choose(), self._config, list)
        async with AsyncExitStack() as stack:
            self.announcer = await stack.enter_async_context(announcing(cast(Any, self.node), self.standing.record))
            yield


def publish(contents: dict[str, dict[str, bytes]], *records: PeerRecord) -> None:
    for record in records:
        found = next(i for i in range(9) if identity(i).peer_id == record.peer_id)
        raw = replace(record, n_blocks=N_BLOCKS).encode(identity(found))
        contents.setdefault(record.key(1), {})[record.peer_id] = raw


@pytest.mark.parametrize(("peers", "num_blocks"), [(2, 3), (3, 2), (4, 2), (5, 1)])
async def test_peers_that_start_at_once_take_different_blocks(peers: int, num_blocks: int) -> None:
    contents: dict[str, dict[str, bytes]] = {}
    newcomers = [Newcomer(i, contents, Loader(), num_blocks=num_blocks) for i in range(peers)]
    async with AsyncExitStack() as stack:
        for newcomer in newcomers:
            await newcomer.reader.refresh()
        for newcomer in newcomers:  # all have chosen before anyone's claim can be seen
            await stack.enter_async_context(newcomer._announced())
        assert len({newcomer.standing.span for newcomer in newcomers}) == 1
        arrivals = (newcomer.first.load(newcomer.standing, newcomer.announcer) for newcomer in newcomers)
        spans = cast(list[Span], await asyncio.gather(*arrivals))
    replicas = [sum(block in span for span in spans) for block in range(N_BLOCKS)]
    assert max(replicas) - min(replicas) <= 1, spans


async def test_what_an_earlier_life_announced_does_not_count() -> None:
    contents: dict[str, dict[str, bytes]] = {}
    publish(contents, peer(0, "0:3"), peer(1, "3:6"))
    assert await Newcomer(0, contents, Loader(), num_blocks=3).arrive() == Span(0, 3)
    publish(contents, peer(0, "0:3"), peer(1, "0:3"))
    assert await Newcomer(0, contents, Loader(), num_blocks=3).arrive() == Span(3, 6)


async def test_what_does_not_fit_after_all_becomes_shorter() -> None:
    contents: dict[str, dict[str, bytes]] = {}
    publish(contents, peer(1, "0:2"))
    loader = Loader(fits=3)
    newcomer = Newcomer(0, contents, loader)
    span = await newcomer.arrive()
    assert [len(tried) for tried in loader.loaded] == [6, 4, 3]
    assert len(span) == 3 and newcomer.first.num_blocks == 3
    assert span.start >= 2, "it is chosen anew where the swarm is weakest"
    assert newcomer.said == [
        "blocks 0:6 do not fit into memory; trying 4",
        f"blocks {loader.loaded[1]} do not fit into memory; trying 3",
    ]
    told = [PeerRecord.decode(raw, now=newcomer.node.now()) for _, raw, _ in newcomer.node.stored]
    assert [str(r.span) for r in told if r.state == "joining"] == [str(tried) for tried in loader.loaded]


async def test_too_little_memory_for_anything() -> None:
    with pytest.raises(UserError, match="not even blocks 0:1 fit"):
        await Newcomer(0, {}, Loader(fits=0)).arrive()
    with pytest.raises(UserError, match="name fewer with --blocks"):
        await Newcomer(0, {}, Loader(fits=0), blocks="0:4").arrive()


async def test_fewer_blocks_than_any_span_has() -> None:
    coarse = replace(SERVED, legal_cuts=(0, 3, 6))
    with pytest.raises(ConfigError, match="--num-blocks 3 at least"):
        await Newcomer(0, {}, Loader(served=coarse), num_blocks=2).arrive()


# ---------------------------------------------------------------------- later


@asynccontextmanager
async def settled(
    contents: dict[str, dict[str, bytes]], *others: PeerRecord
) -> AsyncIterator[tuple[Balance, Newcomer]]:
    """A peer that serves 0:3 among others, and its balance."""
    publish(contents, *others)
    newcomer = Newcomer(0, contents, Loader(), num_blocks=3)
    await newcomer.reader.refresh()
    async with newcomer._announced():
        newcomer.standing.span = Span(0, 3)
        newcomer.standing.resume()
        await newcomer.announcer.announce()
        yield Balance(newcomer.standing, SERVED, newcomer.reader, HASTE, random.Random(0)), newcomer


async def test_a_gap_is_found_and_claimed() -> None:
    async with settled({}, peer(1, "0:6", "joining")) as (balance, newcomer), asyncio.timeout(20):
        due = asyncio.create_task(balance.due(3))
        await asyncio.sleep(0.3)
        assert not due.done(), "who is joining will be there"
        publish(newcomer.node.contents, peer(1, "0:3", sequence=2))
        await newcomer.reader.refresh()
        target = await due
        assert target == Span(3, 6)
        assert not await balance.still_due(target), "it has not been claimed yet"
        newcomer.standing.moving_to = target
        await newcomer.announcer.announce()
        assert await balance.still_due(target)
        publish(newcomer.node.contents, peer(1, "0:3", sequence=3), peer(2, "3:6", "joining", sequence=1))
        assert not await balance.still_due(target), "somebody else came first"


async def test_who_is_needed_stays() -> None:
    async with settled({}, peer(1, "0:2")) as (balance, _):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(balance.due(3), 0.5)


async def test_after_a_move_that_failed_it_rests() -> None:
    async with settled({}, peer(1, "0:3")) as (balance, _):
        balance.rest()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(balance.due(3), 0.5)


async def test_who_leaves_does_not_move() -> None:
    async with settled({}, peer(1, "0:3")) as (balance, newcomer):
        newcomer.standing.leave()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(balance.due(3), 0.5)
