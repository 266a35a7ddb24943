"""Sessions over real gRPC: the same values as the unsplit blocks, whatever happens to the peers on the way."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.blame import Blame
from client.config import ClientConfig
from client.session import Session
from client.spec import SessionSpec
from client.trace import trace_of
from dht.record import PeerRecord
from peer.host import SpanHost
from protocol.errors import BlocksMissing
from protocol.journal import Entry, Part
from protocol.limits import IN_FLIGHT
from protocol.messages import HIDDEN, CacheOp, StepResult, TensorSpec
from protocol.span import Span
from slicing import CacheOp as SpanOp
from slicing import SpanModel, load_span, resolve
from tensor_codecs import codec, dtype_of
from tests.harness import KnownPeers, open_host, record_of
from tests.tiny import WIDTH

N_BLOCKS = 6
CONFIG = ClientConfig(codec="none", wait_s=20.0, avoid_s=5.0, audit=0.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(N_BLOCKS)


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> SpanModel:
    return load_span(resolve(str(checkpoint)), Span(0, N_BLOCKS), dtype=torch.float32)


def entry(hidden: Tensor, position: int, *ops: CacheOp) -> Entry:
    payload = codec("none").encode(hidden)
    spec = TensorSpec(HIDDEN, "none", "float32", tuple(hidden.shape), len(payload))
    return Entry(position, hidden.shape[-2], hidden.shape[-3], (Part(spec, payload),), ops)


def tensor(result: StepResult) -> Tensor:
    ((spec, payload),) = result.step.parts()
    return codec(spec.codec).decode(payload, spec.shape, dtype_of(spec.dtype))


def inputs(steps: int, rows: int = 1, prompt: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, prompt if i == 0 else 1, WIDTH, generator=generator) for i in range(steps)]


def reference(model: SpanModel, steps: Sequence[Tensor]) -> list[Tensor]:
    cache = model.new_cache()
    return [model.step(hidden, cache) for hidden in steps]


@asynccontextmanager
async def swarm(
    checkpoint: Path, *spans: str, config: ClientConfig = CONFIG, **settings: object
) -> AsyncIterator[tuple[list[SpanHost], KnownPeers, Session, list[str]]]:
    """Hosts of these spans, a session over them, and the events that it tells."""
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(open_host(checkpoint, Span.parse(span), index, **settings))
            for index, span in enumerate(spans)
        ]
        known = KnownPeers([record_of(host) for host in hosts])
        stack.push_async_callback(known.close)
        events: list[str] = []
        spec = SessionSpec(hosts[0].served.fingerprint, N_BLOCKS, codec="none", batch=1, max_tokens=64)
        session = Session(spec, known, Blame(config.avoid_s), config, events.append)
        yield hosts, known, session, events


async def kill(host: SpanHost) -> None:
    """The port is closed at once, streams are reset: what a client sees of `kill -9`."""
    assert host._server is not None
    await host._server.stop(None)


async def run(session: Session, steps: Sequence[Tensor], start: int = 0) -> list[Tensor]:
    outputs, position = [], start
    for hidden in steps:
        outputs.append(tensor(await session.step(entry(hidden, position))))
        position += hidden.shape[-2]
    return outputs


@pytest.mark.parametrize("spans", [("0:6",), ("0:2", "2:6"), ("0:3", "2:5", "4:6")], ids="|".join)
async def test_a_chain_is_bit_identical_to_the_unsplit_blocks(
    checkpoint: Path, whole: SpanModel, spans: tuple[str, ...]
) -> None:
    steps = inputs(6, rows=2)
    async with swarm(checkpoint, *spans) as (hosts, _, session, _):
        outputs = await run(session, steps)
        assert [link.peer.peer_id for link in session.chain] == [host.identity.peer_id for host in hosts]
        await session.close()
        assert all(len(host.sessions) == 0 for host in hosts), "a closed session is gone"
        assert all(host.budget.tokens_left == host.budget.tokens_total for host in hosts)
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("victim", [0, 1])
async def test_a_lost_peer_is_replaced_at_any_step(checkpoint: Path, whole: SpanModel, victim: int, at: int) -> None:
    steps = inputs(5)
    spans = ("0:3", "3:6", "0:6")  # the third one stands by
    async with swarm(checkpoint, *spans) as (hosts, known, session, events):
        standby, known.records = known.records[2], known.records[:2]
        outputs = await run(session, steps[:at])
        known.records = [*known.records, standby]
        await kill(hosts[victim])
        position = sum(hidden.shape[-2] for hidden in steps[:at])
        outputs += await run(session, steps[at:], position)
        assert standby.peer_id in {link.peer.peer_id for link in session.chain}
        assert hosts[victim].identity.peer_id not in {link.peer.peer_id for link in session.chain}
        assert at == 0 or any("lost" in event for event in events)
        trace = trace_of(session)
        assert [(hop.peer_id, hop.blocks) for hop in trace.chain] == [(x.peer.peer_id, x.span) for x in session.chain]
        assert len(trace.events) == len(events)
        assert any(hop.timed for hop in trace.hops) and all(hop.spent.compute_ms > 0 for hop in trace.hops if hop.steps)
    for got, wanted in zip(outputs, reference(whole, steps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


async def test_all_peers_are_lost_and_others_come(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(5)
    async with swarm(checkpoint, "0:3", "3:6", "0:4", "4:6") as (hosts, known, session, events):
        first, second = known.records[:2], known.records[2:]
        known.records = first
        outputs = await run(session, steps[:3])
        await kill(hosts[0])
        await kill(hosts[1])
        known.records = []

        def others_come() -> None:
            if any("waiting: blocks" in event for event in events):
                known.records = second

        known.on_refresh = others_come
        outputs += await run(session, steps[3:], 9)
    assert any(re.search(r"waiting: blocks (0:3|3:6|0:6) have no peer", event) for event in events), events
    for got, wanted in zip(outputs, reference(whole, steps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


async def test_a_broken_connection_is_resumed_without_a_replay(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(6)
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, _):
        outputs = await run(session, steps[:3])
        for hop in session._chain.hops:
            hop._stream._call.cancel()  # type: ignore[union-attr]
        outputs += await run(session, steps[3:], 9)
        assert session.stats.reroutes == session.stats.replayed_tokens == 0
        assert all(len(host.sessions) == 1 for host in hosts)
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_step_sent_again_is_not_applied_again(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(4)
    async with swarm(checkpoint, "0:6") as (hosts, _, session, _):
        outputs = await run(session, steps[:2])
        (hop,) = session._chain.hops
        step = replace(entry(steps[2], 8), step_id=2).step(session._chain.epoch)
        answers = []
        for _ in range(2):
            hop.send(step)
            answers.append((await session._chain.inbox.get()).what)
        assert isinstance(answers[0], StepResult)
        assert answers[0] == answers[1]
        outputs += await run(session, steps[2:], 8)
        (served,) = hosts[0].sessions
        assert served.tokens == 10
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_peer_of_an_older_epoch_cannot_write(checkpoint: Path, whole: SpanModel) -> None:
    """What the client, or a peer that was given up and woke, sends under an older epoch changes nothing."""
    steps = inputs(4)
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, _):
        outputs = await run(session, steps[:1])
        old_epoch, old_edge = session._chain.epoch, session._chain.hops[1].edge
        for hop in session._chain.hops:
            hop._stream._call.cancel()  # type: ignore[union-attr]  # a new epoch begins
        outputs += await run(session, steps[1:2], 7)
        assert session._chain.epoch > old_epoch
        stale = replace(entry(torch.ones_like(steps[2]), 8), step_id=2).step(old_epoch)
        session._chain.hops[0].send(stale)
        written = hosts[0].house.links.push(hosts[1].identity.peer_id, old_edge, stale)  # type: ignore[union-attr]
        await written
        outputs += await run(session, steps[2:], 8)
        assert [served.tokens for host in hosts for served in host.sessions] == [10, 10]
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_missing_blocks_are_named(checkpoint: Path) -> None:
    config = replace(CONFIG, wait_s=0.0)
    async with swarm(checkpoint, "0:2", "4:5", config=config) as (_, _, session, _):
        with pytest.raises(BlocksMissing, match=r"blocks 2:4, 5:6 have no peer") as caught:
            await run(session, inputs(1))
        assert caught.value.missing == ("2:4", "5:6")
        assert caught.value.retryable


async def test_a_full_peer_refuses_at_once_and_another_takes_over(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(3)
    async with swarm(checkpoint, "0:6", "0:6", max_sessions=1) as (hosts, known, first, _):
        known.records = known.records[:1]
        await run(first, steps)
        known.records = [record_of(host) for host in hosts]
        second = Session(first.spec, known, Blame(5.0), CONFIG)
        outputs = await run(second, steps)
        assert [link.peer.peer_id for link in second.chain] == [hosts[1].identity.peer_id]
        third = Session(first.spec, known, Blame(5.0), replace(CONFIG, wait_s=0.0))
        with pytest.raises(BlocksMissing, match="sessions already") as caught:
            await run(third, steps)
        assert caught.value.retry_after_s is not None
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_the_kv_budget_is_held(checkpoint: Path) -> None:
    config = replace(CONFIG, wait_s=0.0)
    async with swarm(checkpoint, "0:6", config=config, kv_tokens=100) as (hosts, known, session, _):
        await run(session, inputs(1))
        assert hosts[0].budget.tokens_left == 36
        other = Session(replace(session.spec, max_tokens=37), known, Blame(5.0), config)
        with pytest.raises(BlocksMissing, match="KV budget is used up: 36 of 100"):
            await run(other, inputs(1))
        growing = Session(replace(session.spec, max_tokens=0), known, Blame(5.0), config)
        with pytest.raises(BlocksMissing, match="KV budget"):
            await run(growing, inputs(1, prompt=40))
        await session.close()
        assert hosts[0].budget.tokens_left == 100


async def test_a_cancelled_step_leaves_the_session_usable(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(5)
    async with swarm(checkpoint, "0:3", "3:6") as (_, _, session, _):
        outputs = await run(session, steps[:2])
        task = asyncio.create_task(session.step(entry(steps[4], 8)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        outputs += await run(session, steps[2:], 8)
        assert session.stats.replayed_tokens == 8
    for got, wanted in zip(outputs, reference(whole, steps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


async def test_recovery_after_crops_and_reorders(checkpoint: Path, whole: SpanModel) -> None:
    """What speculation and beams leave behind is replayed as it is."""
    steps = inputs(6, rows=3)
    ops = {2: [CacheOp("reorder", (2, 0, 0))], 3: [CacheOp("crop", (5,))], 4: [CacheOp("reorder", (1, 1, 2))]}
    async with swarm(checkpoint, "0:3", "3:6", "3:6") as (hosts, known, session, _):
        standby, known.records = known.records[2], known.records[:2]
        cache, position = whole.new_cache(), 0
        for i, hidden in enumerate(steps):
            if i == 5:
                known.records = [*known.records, standby]
                await kill(hosts[1])
            for op in ops.get(i, []):
                cache.apply(SpanOp(op.kind, op.values[0] if op.kind == "crop" else op.values))  # type: ignore[arg-type]
                position = op.values[0] if op.kind == "crop" else position
            got = tensor(await session.step(entry(hidden, position, *ops.get(i, []))))
            assert torch.allclose(got, whole.step(hidden, cache), atol=1e-5)
            position += hidden.shape[-2]
        assert session.stats.reroutes == 1


async def test_evicted_journals_are_made_again_from_the_first(checkpoint: Path, whole: SpanModel) -> None:
    steps = inputs(5)
    async with swarm(checkpoint, "0:3", "3:6", "3:6") as (hosts, known, session, _):
        standby, known.records = known.records[2], known.records[:2]
        outputs = await run(session, steps[:3])
        (served,) = hosts[0].sessions
        served.outputs.evict()
        known.records = [*known.records, standby]
        await kill(hosts[1])
        outputs += await run(session, steps[3:], 9)
        assert session.stats.replayed_tokens == 9, "the client told the first peer everything again"
        assert session.stats.reroutes == 1
    for got, wanted in zip(outputs, reference(whole, steps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


async def test_a_peer_keeps_its_journals_within_their_budget(checkpoint: Path) -> None:
    async with swarm(checkpoint, "0:3", "3:6", journal_mib=1, kv_tokens=16384) as (hosts, known, session, _):
        steps = inputs(3, prompt=3000)
        await run(session, steps[:1])
        await run(session, [steps[1]] * IN_FLIGHT, 3000)
        assert 0 < hosts[0].journals.bytes_used <= 1 << 20
        assert hosts[1].journals.bytes_used < 4096, "after the last block nobody needs to be told but of recent steps"
        other = Session(session.spec, known, Blame(5.0), CONFIG)
        await run(other, steps[:2])
        assert hosts[0].journals.bytes_used <= 1 << 20
        assert hosts[0].journals.evicted == 1
        await session.close()
        await other.close()
        assert hosts[0].journals.bytes_used == 0


async def test_a_replacement_is_told_by_its_neighbour(checkpoint: Path, whole: SpanModel) -> None:
    """The client's own line carries nothing of a replay, however many hops are lost behind the first."""
    steps = inputs(6)
    async with swarm(checkpoint, "0:2", "2:4", "4:6", "2:3", "3:6") as (hosts, known, session, _):
        standby, known.records = known.records[3:], known.records[:3]
        outputs = await run(session, steps[:4])
        known.records = [*known.records, *standby]
        await kill(hosts[1])
        await kill(hosts[2])
        outputs += await run(session, steps[4:], 10)
        assert session.stats.reroutes == 2
        assert session.stats.replayed_tokens == session.stats.relayed == 0
        assert [len(link.span) for link in session.chain] == [2, 1, 3]
        assert hosts[3].house.intake.pushed >= 2
        assert hosts[3].house.intake.relayed == 0
    for got, wanted in zip(outputs, reference(whole, steps), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


async def test_steps_are_pushed_and_the_clients_traffic_does_not_grow_with_the_hops(checkpoint: Path) -> None:
    steps = inputs(12)
    sent, received = [], []
    for spans in (["0:6"], ["0:2", "2:4", "4:6"]):
        async with swarm(checkpoint, *spans) as (hosts, _, session, _):
            await run(session, steps[:2])
            before = session.stats.bytes_sent, session.stats.bytes_received
            await run(session, steps[2:], 8)
            sent.append(session.stats.bytes_sent - before[0])
            received.append(session.stats.bytes_received - before[1])
            assert session.stats.relayed == 0
            assert [host.house.intake.begun for host in hosts] == [12, 0, 0][: len(hosts)]
            assert [host.house.intake.pushed for host in hosts] == [0, 12, 12][: len(hosts)]
            assert all(host.house.intake.relayed == 0 for host in hosts)
    assert sent[1] == sent[0], "what the client sends"
    trace_bytes = 2 * 10 * 64  # two more hops tell in each of ten steps what it cost them, and two digests
    assert received[0] <= received[1] <= received[0] + trace_bytes, "what it receives"


async def test_peers_that_cannot_reach_each_other_are_relayed_and_tried_again(
    checkpoint: Path, whole: SpanModel
) -> None:
    steps = inputs(9)
    config = replace(CONFIG, avoid_s=0.3)
    async with swarm(checkpoint, "0:2", "2:4", "4:6", config=config) as (hosts, _, session, events):
        links = hosts[0].house.links
        assert links is not None
        found = links._resolve

        async def nobody(peer_id: str, useless: PeerRecord | None) -> None:
            return None

        links._resolve = nobody
        outputs = await run(session, steps[:4])
        assert session.stats.relayed == 4
        assert hosts[1].house.intake.relayed == 4
        assert hosts[2].house.intake.pushed == 4, "the other edge is pushed over"
        assert any("go through this client" in event for event in events)
        links._resolve = found
        for _, link in links._links.values():
            link.cancel()
        await asyncio.sleep(0.4)  # until the edge may be tried again
        outputs += await run(session, steps[4:], 10)
        assert session.stats.relayed == 4
        assert hosts[1].house.intake.pushed == 5
        assert session.stats.reroutes == 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_second_link_that_is_cut_is_found_without_another_wait(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = inputs(6)
    async with swarm(checkpoint, "0:2", "2:4", "4:6") as (hosts, _, session, events):

        def swallow(host: SpanHost) -> None:
            """Whatever that host pushes from now on is lost on its way, and nobody says so."""
            links = host.house.links
            assert links is not None

            def push(*_: object) -> asyncio.Future[None]:
                written = asyncio.get_running_loop().create_future()
                written.set_result(None)
                return written

            monkeypatch.setattr(links, "push", push)

        outputs = await run(session, steps[:3])
        swallow(hosts[1])
        outputs += await run(session, steps[3:4], 9)
        swallow(hosts[0])
        monkeypatch.setattr("client.session.LEAST_S", 300.0)
        async with asyncio.timeout(60.0):
            outputs += await run(session, steps[4:5], 10)
        monkeypatch.undo()
        outputs += await run(session, steps[5:], 11)
        assert [event.split(" go through")[0] for event in events if "go through this client" in event] == [
            f"steps from {a.name} to {b.name}" for a, b in reversed(list(itertools.pairwise(session._chain.hops)))
        ]
        assert session.stats.reroutes == 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_idle_sessions_are_reclaimed(checkpoint: Path) -> None:
    async with swarm(checkpoint, "0:6") as (hosts, _, session, _):
        await run(session, inputs(1))
        table = hosts[0].sessions
        now_s = asyncio.get_running_loop().time()
        assert table.reclaim(now_s + table.idle_s - 60) == 0
        assert table.reclaim(now_s + table.idle_s + 60) == 1
        assert hosts[0].budget.tokens_left == hosts[0].budget.tokens_total
        outputs = await run(session, inputs(2)[1:], 7)
        assert outputs[0].shape == (1, 1, WIDTH), "a client that comes back late replays"
        assert session.stats.replayed_tokens == 7
