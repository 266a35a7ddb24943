"""Steps of many sessions through one span: in shared passes, each with its own answer, its own fault, its own room."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dht.background import background
from peer.accounts import Account
from peer.budget import JournalBudget, KvBudget, MessageBudget
from peer.compute import ComputeThread
from peer.config import PeerConfig
from peer.delivery import Delivery
from peer.engine import Engine
from peer.meter import Meter
from peer.scheduler import Scheduler
from peer.session import Session
from peer.table import SessionTable
from peer.tally import Tally
from peer.worker import Worker
from protocol.errors import BadMessage, PeerFault, PeerFull, SessionLost
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import HIDDEN, CacheOp, Open, Step, TensorSpec
from protocol.span import Span
from slicing import PagedCache, RaggedSpan, SpanCache, SpanModel, load_span, resolve
from slicing.paged import PAGE_TOKENS
from tensor_codecs import codec, dtype_of, names
from tests.slicing.architectures import N_BLOCKS, make_checkpoint

WHOLE = Span(0, N_BLOCKS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    folder: Path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return load_span(resolve(str(folder)), WHOLE)


ALLOWANCE = PeerConfig().allowance


@dataclass
class Bench:
    """A span with its engine, and no network."""

    model: SpanModel
    table: SessionTable
    engine: Engine
    compute: ComputeThread

    def open(self, tag: int, client: str = "", max_tokens: int = 0, batch: int = 1) -> Session:
        session_id = bytes([tag]) * SESSION_ID_BYTES
        account = Account(client or str(tag), ALLOWANCE)
        return self.table.open(Open(session_id, 1, "f", WHOLE, "none", batch, max_tokens), 0.0, account)

    async def step(self, session: Session, hidden: Tensor, *ops: CacheOp) -> Tensor:
        """The session's next step."""
        position = ops[-1].values[0] if ops and ops[-1].kind == "crop" else session.tokens
        payload = codec("none").encode(hidden)
        spec = TensorSpec(HIDDEN, "none", "float32", tuple(hidden.shape), len(payload))
        step = Step(1, session.next_step, position, (spec,), payload, ops)
        await self.engine.execute(session, Delivery(step, 0.0, 0, pushed=False))
        output = session.outputs.latest
        assert output is not None
        (part,) = output.parts
        return codec("none").decode(part.payload, part.spec.shape, dtype_of(part.spec.dtype))

    def block(self) -> Callable[[], None]:
        """Nothing is computed until the returned function is called."""
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wait() -> None:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(30)

        self.compute.submit(wait)
        return gate.set


@asynccontextmanager
async def bench(model: SpanModel, *, kv_tokens: int = 4096, max_batch: int = 64) -> AsyncIterator[Bench]:
    ragged = RaggedSpan(model) if max_batch > 1 else None
    table = SessionTable(
        model,
        ragged,
        "f",
        N_BLOCKS,
        KvBudget(kv_tokens, N_BLOCKS),
        JournalBudget(1 << 20),
        MessageBudget(1 << 20),
        codecs=frozenset(names()),
        max_sessions=64,
        idle_s=60.0,
        resume_s=60.0,
    )
    compute, meter = ComputeThread(1), Meter(N_BLOCKS)
    engine = Engine(Worker(model, ragged, table, 512), compute, table, Scheduler(max_batch, 512, 0.5), meter, Tally())
    try:
        async with background(engine.run(), "engine"):
            yield Bench(model, table, engine, compute)
    finally:
        compute.close()


def prompt(tokens: int, seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(seed))


def alone(model: SpanModel, *pieces: Tensor) -> list[Tensor]:
    cache = model.new_cache()
    return [model.step(piece, cache) for piece in pieces]


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_batch", [64, 1])
async def test_sessions_share_passes_and_get_what_each_would_alone(max_batch: int, model: SpanModel) -> None:
    async with bench(model, max_batch=max_batch) as one:
        sessions = [one.open(tag) for tag in range(8)]
        for turn in range(5):
            before = one.engine.passes
            release = one.block()
            steps = [one.step(s, prompt(1 + 3 * (turn == 0), 10 * tag + turn)) for tag, s in enumerate(sessions)]
            running = [asyncio.create_task(step) for step in steps]
            await asyncio.sleep(0)
            release()
            outputs = await asyncio.gather(*running)
            # The first to come begins a pass; the others share the next one.
            assert one.engine.passes - before <= (8 if max_batch == 1 else 2)
        for tag, output in enumerate(outputs):
            wanted = alone(model, *(prompt(1 + 3 * (turn == 0), 10 * tag + turn) for turn in range(5)))
            assert close(output, wanted[-1])
            if max_batch == 1:
                assert torch.equal(output, wanted[-1])


async def test_a_fault_in_a_pass_is_that_of_its_own_step(model: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7: the others of the pass get their answers, and their sessions go on."""
    run = RaggedSpan.run

    def fails(self: RaggedSpan, stretches: list[object]) -> list[Tensor]:
        if any(bool((s.hidden == 13.0).any()) for s in stretches):  # type: ignore[attr-defined]
            raise RuntimeError("an unlucky number")
        return run(self, stretches)  # type: ignore[arg-type]

    monkeypatch.setattr(RaggedSpan, "run", fails)
    async with bench(model) as one:
        good, evil, other = one.open(1), one.open(2), one.open(3)
        release = one.block()
        results = [
            asyncio.create_task(one.step(session, hidden))
            for session, hidden in [(good, prompt(3, 1)), (evil, torch.full((1, 3, 64), 13.0)), (other, prompt(3, 3))]
        ]
        await asyncio.sleep(0)
        release()
        first, fault, last = await asyncio.gather(*results, return_exceptions=True)
        assert isinstance(fault, PeerFault)
        assert isinstance(first, Tensor) and close(first, alone(model, prompt(3, 1))[0])
        assert isinstance(last, Tensor) and close(last, alone(model, prompt(3, 3))[0])
        with pytest.raises(SessionLost):
            await one.step(evil, prompt(1, 4))
        await one.step(good, prompt(1, 5))


async def test_ill_formed_steps_are_refused_and_their_sessions_go_on(model: SpanModel) -> None:
    async with bench(model) as one:
        session = one.open(1)
        await one.step(session, prompt(3, 1))
        for bad in (prompt(1, 2)[..., :63], torch.zeros(1, 600, 64)):
            with pytest.raises(BadMessage):
                await one.step(session, bad)
        with pytest.raises(BadMessage, match="crop"):
            await one.step(session, prompt(1, 2), CacheOp("crop", (3,)), CacheOp("crop", (-1,)))
        assert session.broken, "its first operation had been done"


async def test_a_prompt_comes_in_pieces_while_others_decode(model: SpanModel) -> None:
    async with bench(model) as one:
        decoding, reading = one.open(1), one.open(2)
        await one.step(decoding, prompt(4, 1))
        await one.step(decoding, prompt(1, 2))
        before = one.engine.passes
        long = asyncio.create_task(one.step(reading, prompt(500, 3)))
        await asyncio.sleep(0)
        tokens = 0
        while not long.done():
            await one.step(decoding, prompt(1, 4 + tokens))
            tokens += 1
        assert one.engine.passes - before > 3 and tokens > 2
        assert close(await long, alone(model, prompt(500, 3))[0])


async def test_who_leaves_is_not_computed_for(model: SpanModel) -> None:
    async with bench(model) as one:
        staying, leaving = one.open(1), one.open(2)
        release = one.block()
        stays = asyncio.create_task(one.step(staying, prompt(2, 1)))
        await asyncio.sleep(0)
        leaves = asyncio.create_task(one.step(leaving, prompt(400, 2)))
        await asyncio.sleep(0)
        assert one.engine.queued == 2
        leaves.cancel()
        release()
        await stays
        with pytest.raises(asyncio.CancelledError):
            await leaves
        assert one.engine.queued == 0 and leaving.next_step == 0
        assert leaving.running is not None and leaving.running.done()
        found = await one.step(leaving, prompt(3, 3))
        assert close(found, alone(model, prompt(3, 3))[0])


@pytest.mark.parametrize("rows", [1, 2])
async def test_a_session_that_is_dropped_during_its_pass(
    rows: int, model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is kept, and the others of the pass do not notice."""
    async with bench(model) as one:
        session, other = one.open(1), one.open(2)
        await one.step(session, prompt(3, 1))
        decode = model.run_decoder

        def dropped(*args: Any, **kwargs: Any) -> Tensor:
            if one.table.find(session.session_id):
                asyncio.run_coroutine_threadsafe(drop(), loop).result(30)
            return decode(*args, **kwargs)

        async def drop() -> None:
            one.table.close(session)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(model, "run_decoder", dropped)
        ops = (CacheOp("repeat", (2,)),) if rows == 2 else ()
        with contextlib.suppress(SessionLost, AssertionError):  # the output may be asked for, and is gone
            await one.step(session, prompt(1, 2, rows=rows), *ops)
        await one.step(other, prompt(2, 3))
        assert session.cache is None and session.outputs.latest is None
        assert one.table.budget.tokens_left == 4096 - PAGE_TOKENS


async def test_beams_leave_the_shared_passes(model: SpanModel) -> None:
    """A session of one row that becomes several goes on by itself, from the same tokens."""
    async with bench(model) as one:
        session = one.open(1)
        await one.step(session, prompt(3, 1))
        assert isinstance(session.cache, PagedCache)
        found = await one.step(session, prompt(1, 2, rows=2), CacheOp("repeat", (2,)))
        assert isinstance(session.cache, SpanCache)
        cache = model.new_cache()
        model.step(prompt(3, 1).expand(2, -1, -1), cache)
        assert close(found, model.step(prompt(1, 2, rows=2), cache))


async def test_rejected_tokens_are_taken_back(model: SpanModel) -> None:
    async with bench(model) as one:
        session = one.open(1)
        await one.step(session, prompt(3, 1))
        await one.step(session, prompt(5, 2))
        found = await one.step(session, prompt(1, 3), CacheOp("crop", (5,)))
        assert close(found, alone(model, prompt(3, 1), prompt(5, 2)[:, :2], prompt(1, 3))[-1])


# ---------------------------------------------------------------------- room


async def test_room_is_taken_by_the_page_and_given_back(model: SpanModel) -> None:
    async with bench(model, kv_tokens=4 * PAGE_TOKENS) as one:
        session = one.open(1, max_tokens=3 * PAGE_TOKENS)
        assert one.table.budget.tokens_left == 4 * PAGE_TOKENS, "nothing is used yet"
        assert one.table.tokens_left == PAGE_TOKENS, "but it is spoken for"
        await one.step(session, prompt(2, 1))
        assert one.table.budget.tokens_left == 3 * PAGE_TOKENS
        await one.step(session, prompt(PAGE_TOKENS, 1))
        assert one.table.budget.tokens_left == 2 * PAGE_TOKENS
        one.table.close(session)
        assert one.table.budget.tokens_left == 4 * PAGE_TOKENS


async def test_the_newest_session_makes_room_for_an_older_one(model: SpanModel) -> None:
    """So that one of them ends, and nobody waits for ever. The newest is told, and comes again."""
    async with bench(model, kv_tokens=4 * PAGE_TOKENS) as one:
        oldest, middle, newest = (one.open(tag) for tag in (1, 2, 3))
        for session in (oldest, middle, newest):
            await one.step(session, prompt(PAGE_TOKENS, 1))
        await one.step(oldest, prompt(1, 2))
        assert one.table.budget.tokens_left == 0 and one.table.preempted == 0
        await one.step(middle, prompt(1, 2))
        assert one.table.preempted == 1 and one.table.find(newest.session_id) is None
        with pytest.raises(SessionLost):
            await one.step(newest, prompt(1, 2))
        with pytest.raises(PeerFull) as full:
            await one.step(one.open(4), prompt(1, 2))
        assert full.value.retry_after_s


async def test_a_session_whose_step_waits_can_make_room_too(model: SpanModel) -> None:
    async with bench(model, kv_tokens=3 * PAGE_TOKENS) as one:
        older, newer = one.open(1), one.open(2)
        await one.step(older, prompt(PAGE_TOKENS, 1))
        release = one.block()
        first = asyncio.create_task(one.step(one.open(3), prompt(1, 1)))  # in the pass that does not begin
        await asyncio.sleep(0)
        waits = asyncio.create_task(one.step(newer, prompt(1, 2)))
        await asyncio.sleep(0)
        assert one.table.budget.tokens_left == 0 and one.engine.queued == 2
        more = asyncio.create_task(one.step(older, prompt(1, 3)))
        with pytest.raises(PeerFull):
            await waits
        release()
        await first
        await more


async def test_what_sessions_announce_is_weighed_by_what_they_use(model: SpanModel) -> None:
    async with bench(model, kv_tokens=100 * PAGE_TOKENS) as one:
        for tag in range(60):
            session = one.open(tag, max_tokens=50 * PAGE_TOKENS)
            await one.step(session, prompt(2, 1))
            one.table.close(session)
        assert one.table.room.used_share < 0.1
        for tag in range(6):
            one.open(tag, max_tokens=50 * PAGE_TOKENS)
        with pytest.raises(PeerFull):
            one.open(100, max_tokens=101 * PAGE_TOKENS)
