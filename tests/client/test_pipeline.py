"""The chunks of a prompt on their way through a chain at once: all peers work, and whatever happens to them, the values
are those of the unsplit blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.hop import Hop
from client.open_chain import OpenChain
from client.session import Session
from peer.host import SpanHost
from peer.link import Link, Parcel
from protocol.errors import PeerFull
from protocol.limits import IN_FLIGHT
from protocol.messages import CacheOp, Step
from protocol.span import Span
from slicing import SpanModel
from tests.client.test_session import CONFIG, WIDTH, checkpoint, entry, kill, reference, run, swarm, tensor, whole

__all__ = ["checkpoint", "whole"]  # fixtures

CHUNKS = 12  # more than may be on their way at once
Moment = Callable[[], Awaitable[None]]


def chunks(count: int = CHUNKS, tokens: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(count)]


async def through(session: Session, steps: list[Tensor], position: int = 0, *ops: CacheOp) -> list[Tensor]:
    """One pass of all steps."""
    entries = []
    for hidden in steps:
        entries.append(entry(hidden, position, *(ops if not entries else ())))
        position += hidden.shape[-2]
    return [tensor(result) for result in await session.run(entries)]


def close(outputs: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(outputs) == len(wanted)
    assert all(torch.allclose(got, value, atol=1e-5) for got, value in zip(outputs, wanted, strict=True))


def at_send(monkeypatch: pytest.MonkeyPatch, step_id: int, happens: Moment) -> list[int]:
    """Something happens just before the client sends that step for the first time. Returns the steps that it sent."""
    sent: list[int] = []
    send = OpenChain.send

    async def _send(chain: OpenChain, hop: Hop, step: Step) -> None:
        if step.step_id == step_id and step_id not in sent:
            sent.append(step_id)
            await happens()
        else:
            sent.append(step.step_id)
        await send(chain, hop, step)

    monkeypatch.setattr(OpenChain, "send", _send)
    return sent


@pytest.mark.parametrize("spans", [("0:6",), ("0:2", "2:6"), ("0:3", "2:5", "4:6")], ids="|".join)
async def test_a_pass_of_chunks_is_bit_identical_to_one_after_the_other(
    checkpoint: Path, whole: SpanModel, spans: tuple[str, ...]
) -> None:
    steps = chunks()
    async with swarm(checkpoint, *spans) as (hosts, _, session, _):
        outputs = await through(session, steps[:-1])
        outputs += await run(session, steps[-1:], 5 * (CHUNKS - 1))
        assert (session.stats.steps, session.stats.tokens, session.position) == (CHUNKS, 5 * CHUNKS, 5 * CHUNKS)
        assert session.stats.reroutes == session.stats.replayed_tokens == session.stats.relayed == 0
        assert [served.tokens for host in hosts for served in host.sessions] == [5 * CHUNKS] * len(hosts)
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


def slowly(host: SpanHost, seconds: Callable[[int], float]) -> None:
    """Makes the host a device of its own, which takes so long for a step of so many tokens, and no time of ours."""
    decode = host.model.run_decoder

    def _decode(part: Span, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        time.sleep(seconds(hidden.shape[-2]))
        return decode(part, hidden, *args, **kwargs)

    host.model.run_decoder = _decode  # type: ignore[method-assign]


@pytest.mark.parametrize(("n_hops", "count"), [(3, 4), (3, 12), (2, 6)])
async def test_all_peers_work_at_once(checkpoint: Path, n_hops: int, count: int) -> None:
    """S devices and C chunks: the time of S + C - 1 chunks on one of them, where one device would need S x C."""
    chunk_s, spans = 0.15, {2: ("0:3", "3:6"), 3: ("0:2", "2:4", "4:6")}[n_hops]
    steps = chunks(count + 1, tokens=2)
    async with swarm(checkpoint, *spans) as (hosts, _, session, _):
        await run(session, steps[:1])  # the chain is open
        for host in hosts:
            slowly(host, lambda tokens: chunk_s)
        one_device_s = n_hops * count * chunk_s
        allowed_s = 1.15 * (n_hops + count - 1) / (n_hops * count) * one_device_s
        took_s: list[float] = []
        while len(took_s) < 3 and (not took_s or min(took_s) > allowed_s):  # other programs run, too: the best counts
            started_s = time.perf_counter()
            await through(session, steps[1:], 2, CacheOp("crop", (2,)))
            took_s.append(time.perf_counter() - started_s)
    assert min(took_s) <= allowed_s


async def test_no_more_steps_are_on_their_way_than_may_be(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, done, most = chunks(), 0, 0
    check = Session._check

    def _check(session: Session, *args: Any) -> None:
        nonlocal done
        check(session, *args)
        done += 1

    async def nothing() -> None:
        pass

    monkeypatch.setattr(Session, "_check", _check)
    sent = at_send(monkeypatch, -1, nothing)
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, _):
        decode = hosts[1].model.run_decoder

        def _decode(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal most
            most = max(most, len(sent) - done)
            return decode(*args, **kwargs)

        hosts[1].model.run_decoder = _decode  # type: ignore[method-assign]
        close(await through(session, steps), reference(whole, steps))
    assert 1 < most <= IN_FLIGHT
    assert sent == [*range(CHUNKS)]


@pytest.mark.parametrize("at", [0, 1, 5, IN_FLIGHT, CHUNKS - 1])
@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_peer_is_killed_while_chunks_are_on_their_way(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch, victim: int, at: int
) -> None:
    steps = chunks()
    async with swarm(checkpoint, "0:2", "2:4", "4:6", "0:6") as (hosts, known, session, _):
        standby, known.records = known.records[3], known.records[:3]

        async def happens() -> None:
            known.records = [*known.records, standby]
            await kill(hosts[victim])

        at_send(monkeypatch, at, happens)
        outputs = await through(session, steps[:-1])
        outputs += await run(session, steps[-1:], 5 * (CHUNKS - 1))
        assert hosts[victim].identity.peer_id not in {link.peer.peer_id for link in session.chain} or at == CHUNKS - 1
        assert all(served.tokens == 5 * CHUNKS for served in hosts[3].sessions), "nothing twice"
    close(outputs, reference(whole, steps))


async def test_all_streams_break_while_chunks_are_on_their_way(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = chunks()
    async with swarm(checkpoint, "0:2", "2:4", "4:6") as (hosts, _, session, _):

        async def happens() -> None:
            for hop in session._chain.hops:
                hop._stream._call.cancel()  # type: ignore[union-attr]

        at_send(monkeypatch, 5, happens)
        outputs = await through(session, steps)
        assert session.stats.reroutes == session.stats.replayed_tokens == 0, "every hop goes on where it is"
        assert [served.tokens for host in hosts for served in host.sessions] == [5 * CHUNKS] * 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_peer_freezes_while_chunks_are_on_their_way(checkpoint: Path, whole: SpanModel) -> None:
    steps, awake = chunks(), threading.Event()
    config = replace(CONFIG, step_timeout_s=0.5)
    async with swarm(checkpoint, "0:2", "2:4", "4:6", "2:4", config=config) as (hosts, known, session, events):
        standby, known.records = known.records[3], known.records[:3]
        await run(session, steps[:1])
        known.records = [*known.records, standby]
        held, decode = iter(range(CHUNKS)), hosts[1].model.run_decoder

        def _decode(*args: Any, **kwargs: Any) -> Tensor:
            if next(held) == 3:
                awake.wait()
            return decode(*args, **kwargs)

        hosts[1].model.run_decoder = _decode  # type: ignore[method-assign]
        try:
            outputs = await through(session, steps[1:], 5)
        finally:
            awake.set()
        assert any("at one step" in event for event in events), events
        assert session.stats.reroutes == 1
    close(outputs, reference(whole, steps)[1:])


@pytest.mark.parametrize("losses", [{3}, {4, 5}, {CHUNKS - 1}], ids=str)
async def test_chunks_are_lost_between_two_peers(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch, losses: set[int]
) -> None:
    """A stream that breaks takes with it what it had taken; those after them come on another."""
    steps, write = chunks(), Link._write
    still = set(losses)

    async def _write(link: Link, call: Any, parcel: Parcel) -> None:
        if parcel.step.step_id in still:
            still.discard(parcel.step.step_id)
            parcel.written.set_result(None)
            return
        await write(link, call, parcel)

    monkeypatch.setattr(Link, "_write", _write)
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, _):
        outputs = await through(session, steps)
        assert not still
        assert session.stats.reroutes == session.stats.replayed_tokens == 0
        assert session.stats.relayed >= len(losses)
        assert [served.tokens for host in hosts for served in host.sessions] == [5 * CHUNKS] * 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_the_edge_is_cut_while_chunks_are_on_their_way(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From some chunk on nothing that the first peer pushes arrives: the client carries it."""
    steps, write = chunks(), Link._write

    async def _write(link: Link, call: Any, parcel: Parcel) -> None:
        if parcel.step.step_id >= 4:
            parcel.written.set_result(None)
            return
        await write(link, call, parcel)

    monkeypatch.setattr(Link, "_write", _write)
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, events):
        outputs = await through(session, steps)
        assert any("go through this client" in event for event in events)
        assert session.stats.relayed == CHUNKS - 4
        assert [served.tokens for host in hosts for served in host.sessions] == [5 * CHUNKS] * 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_chunk_is_refused_and_those_after_it_are_not(checkpoint: Path, whole: SpanModel) -> None:
    steps, count = chunks(), iter(range(10 * CHUNKS))
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, _):
        reserve = hosts[1].messages.reserve

        def _reserve(nbytes: int) -> None:
            if next(count) == 4:
                raise PeerFull("there is no room now")
            reserve(nbytes)

        hosts[1].messages.reserve = _reserve  # type: ignore[method-assign]
        outputs = await through(session, steps)
        assert session.stats.reroutes == session.stats.replayed_tokens == 0
        assert [served.tokens for host in hosts for served in host.sessions] == [5 * CHUNKS] * 2
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


@pytest.mark.parametrize("tight", [0, 1])
async def test_a_pipeline_that_fills_a_message_budget_is_held_up(
    checkpoint: Path, whole: SpanModel, tight: int
) -> None:
    """Its own steps give the room back: nothing is refused, and nobody is lost."""
    steps = chunks()
    async with swarm(checkpoint, "0:3", "3:6") as (hosts, _, session, events):
        messages = hosts[tight].messages
        messages.bytes_total = messages.bytes_left = 5 * steps[0].nbytes // 2
        slowly(hosts[tight], lambda tokens: 0.02)
        outputs = await through(session, steps)
        assert events == []
        assert session.stats.reroutes == session.stats.replayed_tokens == session.stats.relayed == 0
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


async def test_a_cancelled_pass_leaves_the_session_as_it_was(
    checkpoint: Path, whole: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = chunks()
    async with swarm(checkpoint, "0:3", "3:6") as (_, _, session, _):
        outputs = await run(session, steps[:2])

        async def happens() -> None:
            task.cancel()

        at_send(monkeypatch, 2 + IN_FLIGHT, happens)  # then some have come out
        wrong = [torch.ones_like(hidden) for hidden in steps]
        task = asyncio.create_task(through(session, wrong, 3, CacheOp("crop", (3,))))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (session.position, session.stats.steps) == (10, 2)
        outputs += await through(session, steps[2:], 10)
        assert session.stats.replayed_tokens == 10
    close(outputs, reference(whole, steps))


async def test_a_chain_may_be_opened_before_its_first_step(checkpoint: Path, whole: SpanModel) -> None:
    steps = chunks(2)
    async with swarm(checkpoint, "0:2", "2:6") as (_, known, session, _):
        costs = await session.open()
        assert [str(link.span) for link in session.chain] == ["0:2", "2:6"]
        assert all(0 < cost.token_ms < cost.step_ms for cost in costs)
        epoch = session._chain.epoch
        outputs = await run(session, steps)
        first_peer = known.times().of(session.chain[0].peer.peer_id)
        (measured, _) = await session.open()
        assert measured.token_ms == 2 * first_peer.token_ms  # type: ignore[operator]  # of two blocks
        assert session._chain.epoch == epoch
    assert all(torch.equal(a, b) for a, b in zip(outputs, reference(whole, steps), strict=True))


@pytest.fixture(autouse=True)
def _quick_to_ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a step is late that had not to be, the client asks soon."""
    monkeypatch.setattr("client.deadline.LEAST_S", 0.3)
    yield
