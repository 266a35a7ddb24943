"""Batches over replicas: who gets which rows, and that nobody can tell the answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from client.batches import MIN_PART_TOKENS, plan, split_rows
from client.config import ClientConfig
from client.remote import RemoteBlocks
from client.rules import Rules
from client.swarm import Swarm
from client.times import Times
from dht.record import ModelRecord, PeerRecord
from dht.view import SwarmView
from peer.host import SpanHost
from protocol.credentials import ClientKey, Credentials
from protocol.errors import BlocksMissing
from protocol.span import Span
from slicing import SpanModel, load_span, resolve
from tests.client.test_chain import NoChance, peers
from tests.harness import open_host, record_of
from tests.tiny import WIDTH

N_BLOCKS = 6
ROWS, TOKENS = 6, 16
CONFIG = ClientConfig(codec="none", wait_s=20.0, avoid_s=5.0, audit=0.0)


# ---------------------------------------------------------------------- plans


def planned(known: Sequence[PeerRecord], rows: int = 12, tokens: int = 64, **how: object) -> dict[str, int]:
    """Rows of each chain, by the ids of its peers."""
    portions = plan(known, Span(0, 12), rows, tokens, times=Times(), rng=NoChance(), **how)  # type: ignore[arg-type]
    assert [p.start for p in portions] == [0, *(p.stop for p in portions[:-1])]
    assert portions[-1].stop == rows
    return {" ".join(link.peer.peer_id for link in p.chain): p.stop - p.start for p in portions}


def with_speed(known: Sequence[PeerRecord], *tokens_per_s: float) -> list[PeerRecord]:
    return [replace(peer, tokens_per_s=speed) for peer, speed in zip(known, tokens_per_s, strict=True)]


def test_replicas_share_the_rows() -> None:
    assert planned(peers("0:12", "0:12")) == {"peer-0": 6, "peer-1": 6}
    assert planned(peers("0:12", "0:12", "0:12")) == {"peer-0": 4, "peer-1": 4, "peer-2": 4}


def test_a_faster_replica_gets_more() -> None:
    assert planned(with_speed(peers("0:12", "0:12"), 1000.0, 2000.0)) == {"peer-0": 4, "peer-1": 8}
    assert planned(with_speed(peers("0:12", "0:12"), 10.0, 10000.0)) == {"peer-1": 12}


def test_one_chain_takes_all_rows() -> None:
    assert planned(peers("0:12")) == {"peer-0": 12}
    assert planned(peers("0:6", "6:12")) == {"peer-0 peer-1": 12}


def test_a_single_row_and_a_small_batch_are_not_split() -> None:
    assert len(planned(peers("0:12", "0:12"), rows=1, tokens=1000)) == 1
    assert len(planned(peers("0:12", "0:12"), rows=4, tokens=MIN_PART_TOKENS // 4)) == 1


def test_chains_may_share_a_peer_that_has_time_for_both() -> None:
    known = with_speed(peers("0:10", "0:10", "10:12"), 1000.0, 1000.0, 1000.0)
    assert planned(known) == {"peer-0 peer-2": 6, "peer-1 peer-2": 6}


def test_failed_and_excluded_peers_get_nothing() -> None:
    known = peers("0:12", "0:12", "0:12")
    assert planned(known, avoid={"peer-1"}) == {"peer-0": 6, "peer-2": 6}
    assert planned(known, rules=Rules(avoid=("peer-0",))) == {"peer-1": 6, "peer-2": 6}
    assert planned(known, rules=Rules(route=("peer-2",))) == {"peer-2": 12}
    with pytest.raises(BlocksMissing):
        planned(peers("0:6"))


def test_chance_does_not_split_what_one_chain_does_best() -> None:
    known = with_speed(peers("0:12", "0:12"), 10.0, 10000.0)
    for seed in range(20):
        (portion,) = plan(known, Span(0, 12), 12, 64, times=Times(), rng=random.Random(seed))
        assert portion.chain[0].peer.peer_id == "peer-1"


@given(st.integers(1, 9), st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_rows_are_split_so_that_the_last_is_through_first(rows: int, costs: list[int]) -> None:
    def last_ms(counts: Sequence[int]) -> int:
        return max(count * cost for count, cost in zip(counts, costs, strict=True))

    def all_splits(left: int, chains: int) -> list[list[int]]:
        if chains == 1:
            return [[left]]
        return [[n, *rest] for n in range(left + 1) for rest in all_splits(left - n, chains - 1)]

    counts = split_rows(rows, [float(cost) for cost in costs])
    assert sum(counts) == rows
    assert last_ms(counts) == min(last_ms(split) for split in all_splits(rows, len(costs)))


# ---------------------------------------------------------------------- over real peers


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(N_BLOCKS)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> SpanModel:
    return load_span(resolve(str(checkpoint)), Span(0, N_BLOCKS), dtype=torch.float32)


class FixedReader:
    """A view of the swarm that stays."""

    def __init__(self, view: SwarmView) -> None:
        self.view = view

    def watch(self, fingerprint: str) -> None:
        """It shows all there is."""

    async def refresh(self) -> SwarmView:
        return self.view


@asynccontextmanager
async def blocks_of(checkpoint: Path, *spans: str) -> AsyncIterator[tuple[list[SpanHost], RemoteBlocks, list[str]]]:
    """Hosts of these spans, and all their blocks as a head sees them; a swarm without a DHT between them."""
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(open_host(checkpoint, Span.parse(span), index))
            for index, span in enumerate(spans)
        ]
        fingerprint = hosts[0].served.fingerprint
        view = SwarmView(
            models=(ModelRecord("", "test", fingerprint, N_BLOCKS),),
            peers_by_model=MappingProxyType({fingerprint: tuple(record_of(host) for host in hosts)}),
        )
        swarm = Swarm(CONFIG)
        swarm._credentials = Credentials(ClientKey.ephemeral())
        swarm._loop, swarm._reader = asyncio.get_running_loop(), FixedReader(view)  # type: ignore[assignment]
        stack.push_async_callback(swarm._disconnect)
        events: list[str] = []
        yield hosts, RemoteBlocks(swarm, fingerprint, N_BLOCKS, CONFIG, events.append), events


def batch(rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(5))


async def run(blocks: RemoteBlocks, hidden: Tensor, **inputs: Tensor) -> Tensor:
    return await asyncio.to_thread(
        blocks.run,
        hidden,
        cache=None,
        ops=(),
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        extras={},
    )


def passes(hosts: Sequence[SpanHost]) -> list[int]:
    """Sessions that were opened on each host."""
    return [host.sessions.opened for host in hosts]


async def test_a_batch_is_split_over_replicas_and_comes_back_whole(checkpoint: Path, whole: SpanModel) -> None:
    async with blocks_of(checkpoint, "0:6", "0:3", "3:6") as (hosts, blocks, events):
        for host, rtt_ms in zip(hosts, (50.0, 1.0, 1.0), strict=True):  # no chains are equal, which chance would mix
            blocks._swarm.stopwatch.note_rtt(host.identity.peer_id, rtt_ms)
        output = await run(blocks, batch())
        assert torch.allclose(output, whole.step(batch(), None), atol=1e-5)
        assert all(count == 1 for count in passes(hosts)), "each has computed"
        assert events == []
        assert sum(host.budget.tokens_left - host.budget.tokens_total for host in hosts) == 0
    async with blocks_of(checkpoint, "0:6") as (_, blocks, _):
        assert torch.allclose(await run(blocks, batch()), output, atol=1e-6), "as from one replica"


async def test_padding_goes_with_its_rows(checkpoint: Path, whole: SpanModel) -> None:
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for row in range(ROWS):
        mask[row, :row] = False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    async with blocks_of(checkpoint, "0:6", "0:6") as (hosts, blocks, _):
        output = await run(blocks, batch(), attention_mask=mask, position_ids=positions)
        assert passes(hosts) == [1, 1]
    expected = whole.step(batch(), None, attention_mask=mask, position_ids=positions)
    assert torch.allclose(output[mask], expected[mask], atol=1e-5)


async def test_positions_that_are_the_same_for_all_rows_go_to_all(checkpoint: Path, whole: SpanModel) -> None:
    positions = torch.arange(5, 5 + TOKENS)[None]
    async with blocks_of(checkpoint, "0:6", "0:6") as (hosts, blocks, _):
        output = await run(blocks, batch(), position_ids=positions)
        assert passes(hosts) == [1, 1]
    assert torch.allclose(output, whole.step(batch(), None, position_ids=positions), atol=1e-5)


async def test_one_row_or_one_replica_is_one_pass(checkpoint: Path) -> None:
    async with blocks_of(checkpoint, "0:6", "0:6") as (hosts, blocks, _):
        await run(blocks, batch(rows=1))
        assert sorted(passes(hosts)) == [0, 1]
    async with blocks_of(checkpoint, "0:3", "3:6") as (hosts, blocks, _):
        await run(blocks, batch())
        assert passes(hosts) == [1, 1]
        assert len(blocks.last_chain) == 2


async def test_the_part_of_a_lost_replica_is_done_by_another(checkpoint: Path, whole: SpanModel) -> None:
    async with blocks_of(checkpoint, "0:6", "0:6") as (hosts, blocks, events):
        await run(blocks, batch())
        assert hosts[0]._server is not None
        await hosts[0]._server.stop(None)
        output = await run(blocks, batch())
        assert torch.allclose(output, whole.step(batch(), None), atol=1e-5)
        assert events, "that is told"
        assert passes(hosts)[1] == 3
        await run(blocks, batch())
        assert passes(hosts)[1] == 4, "and the lost one is avoided from then on"
