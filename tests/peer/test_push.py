"""Steps from peer to peer, over real gRPC: who may push what, where outputs go, and what is done where they cannot."""

from __future__ import annotations

import asyncio
import gc
import math
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from torch import Tensor

from client.chain import Link
from client.hop import Hop
from dht.record import PeerRecord
from peer import link
from peer.delivery import Delivery
from peer.host import SpanHost
from peer.links import Links
from peer.pump import Pump
from peer.replies import ReplyStream
from peer.session import Session
from peer.tally import Tally
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import server_credentials
from protocol.errors import BadMessage, PeerFull, PeerLost, PotluckError, SessionLost, StaleEpoch
from protocol.frames import Reply, ReplyAssembler, held_bytes, step_frames
from protocol.limits import CHUNK_BYTES, EDGE_BYTES, IN_FLIGHT, PAYLOAD_BYTES
from protocol.messages import (
    HIDDEN,
    CacheOp,
    Close,
    Failure,
    Open,
    Opened,
    Progress,
    Route,
    Step,
    StepResult,
    TensorSpec,
)
from protocol.span import Span
from slicing import CacheOp as SpanOp
from slicing import SpanCache, SpanModel, load_span, resolve
from tensor_codecs import codec, dtype_of
from tests.harness import KnownPeers, identity, open_host, record_of
from tests.tiny import WIDTH
from tests.waiting import until

N_BLOCKS = 4
FIRST, SECOND = Span(0, 2), Span(2, 4)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(N_BLOCKS)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> SpanModel:
    return load_span(resolve(str(checkpoint)), Span(0, N_BLOCKS), dtype=torch.float32)


class Visit:
    """One client's session on one peer, driven by hand."""

    def __init__(self, host: SpanHost, stub: pb_grpc.PeerStub, session_id: bytes = b"") -> None:
        self.host = host
        self.stub = stub
        self.session_id = session_id or secrets.token_bytes(16)
        self.edge = secrets.token_bytes(EDGE_BYTES)
        self.epoch = 1
        self.call: Any = None
        self._assembler = ReplyAssembler(PAYLOAD_BYTES)

    async def open(self, **changes: object) -> Opened:
        """The session, on a new stream."""
        self.call, self._assembler = self.stub.Infer(), ReplyAssembler(PAYLOAD_BYTES)
        return await self.open_again(**changes)

    async def open_again(self, **changes: object) -> Opened:
        """The session, on the stream that there is."""
        await self.send(self.opening(**changes).to_proto())
        reply = await self.reply()
        assert isinstance(reply, Opened), reply
        return reply

    def opening(self, **changes: object) -> Open:
        fingerprint, span = self.host.served.fingerprint, self.host.model.span
        request = Open(self.session_id, self.epoch, fingerprint, span, "none", 1, 64, edge=self.edge)
        return replace(request, **changes)  # type: ignore[arg-type]

    async def route(self, to: Visit | None = None, next_step: int = 0) -> None:
        """Outputs go to the client, or to the session `to` on another peer."""
        route = Route(self.epoch, next_step)
        if to is not None:
            route = replace(route, peer_id=to.host.identity.peer_id, edge=to.edge)
        await self.send(route.to_proto())

    async def send(self, *messages: pb.InferRequest) -> None:
        async with asyncio.timeout(WAIT_S):
            for message in messages:
                await self.call.write(message)

    async def reply(self) -> Reply:
        async with asyncio.timeout(WAIT_S):
            while (raw := await self.call.read()) is not grpc.aio.EOF:
                if (reply := self._assembler.feed(raw)) is not None:
                    return reply
        raise AssertionError("the stream has ended")

    async def result(self) -> StepResult:
        reply = await self.reply()
        assert isinstance(reply, StepResult), reply
        return reply

    async def refusal(self) -> PotluckError:
        reply = await self.reply()
        assert isinstance(reply, Failure), reply
        return reply.error

    async def progress(self) -> Progress:
        request = pb.ProgressRequest(session_id=self.session_id)
        return Progress.from_proto(await self.stub.Progress(request, timeout=WAIT_S))

    @property
    def session(self) -> Session:
        found = self.host.sessions.find(self.session_id)
        assert found is not None
        return found


class Pusher:
    """A `Push` stream, driven by hand."""

    def __init__(self, stub: pb_grpc.PeerStub) -> None:
        self._call: Any = stub.Push()

    async def push(self, edge: bytes, *messages: pb.InferRequest) -> None:
        async with asyncio.timeout(WAIT_S):
            for message in messages:
                await self._call.write(pb.PushRequest(edge=edge, request=message))

    async def refusal(self) -> tuple[bytes, PotluckError]:
        async with asyncio.timeout(WAIT_S):
            reply = await self._call.read()
        assert reply is not grpc.aio.EOF
        return reply.edge, Failure.from_proto(reply.failure).error

    async def end(self) -> list[PotluckError]:
        """Ends the stream. Returns the refusals that were still to come."""
        async with asyncio.timeout(WAIT_S):
            await self._call.done_writing()
            refusals = []
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                refusals.append(Failure.from_proto(reply.failure).error)
            return refusals

    def cancel(self) -> None:
        self._call.cancel()


@dataclass
class Peers:
    """Peers in this process, and what a client needs to speak to them."""

    hosts: list[SpanHost]
    known: KnownPeers

    def stub(self, index: int) -> pb_grpc.PeerStub:
        return pb_grpc.PeerStub(self.known.channel(record_of(self.hosts[index])))  # type: ignore[no-untyped-call]

    def visit(self, index: int, session_id: bytes = b"") -> Visit:
        return Visit(self.hosts[index], self.stub(index), session_id)

    async def chain(self) -> tuple[Visit, Visit]:
        """A session over the first two peers: steps go in at the first one, results come from the second one."""
        first, second = self.visit(0), self.visit(1)
        for visit in (first, second):
            await visit.open()
        await second.route()
        await first.route(second)
        return first, second

    def links(self) -> Links:
        """Those of the first peer."""
        found = self.hosts[0].house.links
        assert found is not None
        return found


@asynccontextmanager
async def peers(checkpoint: Path, *spans: Span, **settings: object) -> AsyncIterator[Peers]:
    """Peers of these spans. In the end none of them may hold anything of its budgets."""
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(open_host(checkpoint, span, index, **settings))  # type: ignore[arg-type]
            for index, span in enumerate(spans)
        ]
        known = KnownPeers([])
        stack.push_async_callback(known.close)
        yield Peers(hosts, known)
        for host in hosts:
            for session in host.sessions:
                host.sessions.close(session)
            await until(partial(is_free, host), "the message budget to come back")


def is_free(host: SpanHost) -> bool:
    return host.messages.bytes_left == host.messages.bytes_total


@pytest.fixture
async def two(checkpoint: Path) -> AsyncIterator[Peers]:
    async with peers(checkpoint, FIRST, SECOND) as both:
        yield both


# ---------------------------------------------------------------------- steps, and what must come of them


def encoded(hidden: Tensor) -> tuple[TensorSpec, bytes]:
    payload = codec("none").encode(hidden)
    return TensorSpec(HIDDEN, "none", "float32", tuple(hidden.shape), len(payload)), payload


def step(hidden: Tensor, step_id: int = 0, position: int = 0, *ops: CacheOp, epoch: int = 1) -> Step:
    spec, payload = encoded(hidden)
    return Step(epoch, step_id, position, (spec,), payload, ops)


def tensor(result: StepResult) -> Tensor:
    parts = []
    for spec, payload in result.step.parts():
        if spec.name == HIDDEN:
            whole = codec(spec.codec).decode(payload, spec.shape, dtype_of(spec.dtype))
            parts.append(whole[..., : spec.keep or None, :])
    return torch.cat(parts, dim=-2)


def inputs(tokens: Iterable[int], rows: int = 1, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, WIDTH, generator=generator) for n in tokens]


def steps(tokens: Iterable[int], rows: int = 1, seed: int = 5) -> list[Step]:
    made, position = [], 0
    for step_id, hidden in enumerate(inputs(tokens, rows, seed)):
        made.append(step(hidden, step_id, position))
        position += hidden.shape[-2]
    return made


def reference(model: SpanModel, tokens: Iterable[int], span: Span, rows: int = 1, seed: int = 5) -> list[Tensor]:
    """What the blocks `span` make of those steps' inputs."""
    cache = model.new_cache(span)
    return [model.step(hidden, cache, span=span) for hidden in inputs(tokens, rows, seed)]


TOKENS = (3, 1, 1, 1)
MANY = (*TOKENS, *[1] * IN_FLIGHT)
"""Those of `TOKENS`, and after them as many as are kept as they were."""


async def told(visit: Visit, count: int) -> list[StepResult]:
    return [await visit.result() for _ in range(count)]


def same(results: Iterable[StepResult], wanted: Iterable[Tensor]) -> None:
    for result, value in zip(results, wanted, strict=True):
        assert torch.equal(tensor(result), value)


# ---------------------------------------------------------------------- who may push (laws 3 and 7)


async def test_a_chain_pushes_and_its_results_come_from_the_last_peer(two: Peers, model: SpanModel) -> None:
    first, second = await two.chain()
    for one in steps(TOKENS):
        await first.send(*step_frames(one))
    results = await told(second, 4)
    same(results, reference(model, TOKENS, Span(0, 4)))
    assert [[hop.start for hop in result.step.trace] for result in results] == [[0, 2]] * 4
    assert [result.step.step_id for result in results] == [0, 1, 2, 3]
    assert [result.undelivered for result in results] == [""] * 4
    assert [(host.house.intake.begun, host.house.intake.pushed, host.house.intake.relayed) for host in two.hosts] == [
        (4, 0, 0),
        (0, 4, 0),
    ]


async def test_nobody_takes_steps_under_a_token_that_is_wrong(two: Peers, model: SpanModel) -> None:
    visit, host = two.visit(1), two.hosts[1]
    await visit.open()
    await visit.route()
    pusher = Pusher(two.stub(1))
    (right, *_) = steps(TOKENS)
    for edge in (secrets.token_bytes(16), visit.session_id, visit.edge[:15], visit.edge + b"x", b""):
        await pusher.push(edge, *step_frames(right))
        echoed, error = await pusher.refusal()
        assert echoed == edge
        assert isinstance(error, StaleEpoch), error
    state = await visit.progress()
    assert (state.received, state.next_step, state.arriving_bytes) == (0, 0, 0)
    assert host.house.intake.pushed == 0
    await pusher.push(visit.edge, *step_frames(right))
    same([await visit.result()], reference(model, TOKENS[:1], SECOND))
    assert await pusher.end() == []


async def test_a_token_opens_the_way_into_its_own_session_only(two: Peers, model: SpanModel) -> None:
    """Who holds one session's token cannot write into another one, whatever the step says of itself."""
    mine, other = two.visit(1), two.visit(1)
    for visit in (mine, other):
        await visit.open()
        await visit.route()
    pusher = Pusher(two.stub(1))
    await pusher.push(mine.edge, *step_frames(steps(TOKENS)[0]))
    await mine.result()
    assert (await other.progress()).arriving_bytes == 0
    assert other.session.tokens == 0
    await pusher.push(other.edge, *step_frames(steps(TOKENS, seed=6)[0]))
    same([await other.result()], reference(model, TOKENS[:1], SECOND, seed=6))
    assert mine.session.tokens == 3


async def test_an_old_token_is_worth_nothing_after_a_new_epoch(two: Peers, model: SpanModel) -> None:
    visit, pusher = two.visit(1), Pusher(two.stub(1))
    await visit.open()
    await visit.route()
    made = steps(TOKENS)
    await pusher.push(visit.edge, *step_frames(made[0]))
    results = [await visit.result()]
    old_edge, visit.edge, visit.epoch = visit.edge, secrets.token_bytes(16), 2
    assert await visit.open_again(resume=True) == Opened(1, 3, two.hosts[1].budget.tokens_left, "float32")
    await visit.route(next_step=1)
    await pusher.push(old_edge, *step_frames(replace(made[1], epoch=2)))  # a peer that was given up, and woke
    assert isinstance((await pusher.refusal())[1], StaleEpoch)
    await pusher.push(old_edge, *step_frames(made[1]))
    assert isinstance((await pusher.refusal())[1], StaleEpoch)
    assert visit.session.tokens == 3
    await pusher.push(visit.edge, *step_frames(replace(made[1], epoch=2)))
    results.append(await visit.result())
    same(results, reference(model, TOKENS[:2], SECOND))


@pytest.mark.parametrize("epoch", [0, 2])
async def test_a_pushed_step_of_another_epoch_is_refused(two: Peers, epoch: int) -> None:
    visit, pusher = two.visit(1), Pusher(two.stub(1))
    await visit.open()
    await visit.route()
    await pusher.push(visit.edge, *step_frames(replace(steps(TOKENS)[0], epoch=epoch)))
    _, error = await pusher.refusal()
    assert isinstance(error, StaleEpoch)
    assert (await visit.progress()).received == 0
    assert is_free(two.hosts[1])


async def test_a_token_opens_resumes_routes_asks_and_closes_nothing(two: Peers, model: SpanModel) -> None:
    visit, thief = two.visit(1), two.visit(1)
    await visit.open()
    await visit.route()
    pusher = Pusher(two.stub(1))
    for request in (
        visit.opening(epoch=9, resume=True).to_proto(),
        Route(9, 0).to_proto(),
        Close().to_proto(),
        pb.InferRequest(),
    ):
        await pusher.push(visit.edge, request)
        assert isinstance((await pusher.refusal())[1], BadMessage)
    thief.session_id = visit.edge
    thief.call = thief.stub.Infer()
    await thief.send(thief.opening(epoch=9, resume=True).to_proto())
    assert isinstance(await thief.refusal(), SessionLost)
    with pytest.raises(grpc.aio.AioRpcError, match="does not hold that session"):
        await thief.progress()
    await thief.send(thief.opening(session_id=secrets.token_bytes(16), edge=visit.edge).to_proto())
    error = await thief.refusal()
    assert isinstance(error, BadMessage), "nobody else's sessions take steps under that token"
    assert "another session" in error.message
    await pusher.push(visit.edge, *step_frames(steps(TOKENS)[0]))
    same([await visit.result()], reference(model, TOKENS[:1], SECOND))
    assert len(two.hosts[1].sessions) == 1


async def test_no_peer_knows_another_ones_session_id(two: Peers) -> None:
    secret, inbox = secrets.token_bytes(16), asyncio.Queue[Any]()
    records = [record_of(host) for host in two.hosts]
    places = [(records[0], Span(0, 2)), (records[1], Span(2, 4)), (records[0], Span(2, 4))]
    hops = [Hop(Link(peer, span), two.known.channel(peer), secret, inbox) for peer, span in places]
    other = Hop(hops[0].link, two.known.channel(records[0]), secrets.token_bytes(16), inbox)
    assert len({hop.session_id for hop in (*hops, other)}) == 4
    assert all(len(hop.session_id) == 16 and secret not in hop.session_id for hop in hops)

    first, second = await two.chain()
    await first.send(*step_frames(steps(TOKENS)[0]))
    await second.result()
    thief = two.visit(1, first.session_id)  # the first peer tries to be the client at the second one
    thief.call = thief.stub.Infer()
    await thief.send(thief.opening(epoch=9, resume=True).to_proto())
    assert isinstance(await thief.refusal(), SessionLost)


async def test_a_step_that_is_pushed_twice_is_applied_once(two: Peers, model: SpanModel) -> None:
    visit, pusher = two.visit(1), Pusher(two.stub(1))
    await visit.open()
    await visit.route()
    made = steps(TOKENS)
    for one in (made[0], made[0], made[1], made[0], made[1], made[2], made[3], made[3]):
        await pusher.push(visit.edge, *step_frames(one))
    assert await pusher.end() == []
    same(await told(visit, 4), reference(model, TOKENS, SECOND))
    await until(lambda: visit.session.deliveries.empty() and is_free(two.hosts[1]), "all steps to be seen to")
    assert visit.session.tokens == 6
    await visit.send(*step_frames(made[3]))  # asked for again by the client: sent again, and nothing before it
    same([await visit.result()], reference(model, TOKENS, SECOND)[3:])


# ---------------------------------------------------------------------- what arrives in pieces


async def test_pieces_of_several_sessions_on_one_stream(two: Peers, model: SpanModel) -> None:
    visits, pusher = [two.visit(1) for _ in range(2)], Pusher(two.stub(1))
    frames = []
    for seed, visit in enumerate(visits):
        await visit.open(batch=8, max_tokens=201)
        await visit.route()
        whole = steps([200, 1], rows=8, seed=seed)
        pieces = [*cut(whole[0], 100_000), *step_frames(whole[1])]
        assert len(pieces) > 5
        frames.append([(visit.edge, piece) for piece in pieces])
    for both in zip(*frames, strict=True):
        for edge, piece in both:
            await pusher.push(edge, piece)
    for seed, visit in enumerate(visits):
        same(await told(visit, 2), reference(model, [200, 1], SECOND, rows=8, seed=seed))
    assert await pusher.end() == []


def cut(one: Step, nbytes: int) -> Iterator[pb.InferRequest]:
    """A step's messages, with smaller chunks than need be."""
    yield pb.InferRequest(step=one.header(), chunk=one.payload[:nbytes])
    for offset in range(nbytes, len(one.payload), nbytes):
        yield pb.InferRequest(more=pb.More(), chunk=one.payload[offset : offset + nbytes])


async def test_long_steps_of_two_sessions_share_a_link(checkpoint: Path, model: SpanModel) -> None:
    rows, tokens = 16, 300
    async with peers(checkpoint, FIRST, SECOND, kv_tokens=20_000) as two:
        chains = [await two.chain() for _ in range(2)]
        assert rows * tokens * WIDTH * 4 > CHUNK_BYTES
        for seed, (first, _) in enumerate(chains):
            for one in steps([tokens, 1], rows, seed):
                await first.send(*step_frames(one))
        for seed, (_, second) in enumerate(chains):
            same(await told(second, 2), reference(model, [tokens, 1], Span(0, 4), rows, seed))
        assert len(two.links()._links) == 1
        assert two.hosts[1].house.intake.pushed == 4


@pytest.mark.parametrize("ending", ["half-close", "cancel"])
async def test_a_stream_that_ends_within_a_payload_gives_its_budget_back(two: Peers, ending: str) -> None:
    visits, pusher, host = [two.visit(1) for _ in range(2)], Pusher(two.stub(1)), two.hosts[1]
    for visit in visits:
        await visit.open()
        first, *_ = cut(steps(TOKENS)[0], 100)
        await pusher.push(visit.edge, first)
    held = 2 * held_bytes(first.step)
    await until(lambda: host.messages.bytes_left == host.messages.bytes_total - held, "the halves to arrive")
    if ending == "cancel":
        pusher.cancel()
    else:
        assert await pusher.end() == []
    await until(partial(is_free, host), "the budget to come back")
    assert [(await visit.progress()).received for visit in visits] == [0, 0]


@pytest.mark.parametrize("what", ["ends", "moves on"])
async def test_a_session_that_is_gone_before_a_step_is_whole(two: Peers, what: str) -> None:
    visit, pusher, host = two.visit(1), Pusher(two.stub(1)), two.hosts[1]
    await visit.open()
    first, *rest = cut(steps(TOKENS)[0], 100)
    await pusher.push(visit.edge, first)
    await until(lambda: not is_free(host), "the first half to arrive")
    edge = visit.edge
    if what == "ends":
        await visit.send(Close().to_proto())
        await until(lambda: len(host.sessions) == 0, "the session to end")
    else:
        visit.edge, visit.epoch = secrets.token_bytes(16), 2
        await visit.open_again(resume=True)
    await pusher.push(edge, *rest)
    assert isinstance((await pusher.refusal())[1], StaleEpoch)
    assert is_free(host), "the stream goes on, the budget is back already"
    assert await pusher.end() == []


# ---------------------------------------------------------------------- a next peer that does not take it


async def nobody(peer_id: str, useless: PeerRecord | None) -> None:
    return None


async def test_a_next_peer_that_is_unknown(two: Peers, model: SpanModel) -> None:
    first, second = await two.chain()
    two.links()._resolve = nobody
    for one in steps(TOKENS):
        await first.send(*step_frames(one))
    results = await told(first, 4)
    assert [result.step.step_id for result in results] == [0, 1, 2, 3]
    assert all("not in the swarm's records" in result.undelivered for result in results)
    same(results, reference(model, TOKENS, FIRST))
    for result in results:  # what the client does with them
        await second.send(*step_frames(result.step))
    same(await told(second, 4), reference(model, TOKENS, Span(0, 4)))
    assert (two.hosts[1].house.intake.pushed, two.hosts[1].house.intake.relayed) == (0, 4)
    await until(lambda: not two.links()._links, "the link to nobody to end")


async def test_a_swarm_that_never_says_where_the_next_peer_is(
    two: Peers, model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(peer_id: str, useless: PeerRecord | None) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(link, "RESOLVE_TIMEOUT_S", 0.1)
    first, _ = await two.chain()
    two.links()._resolve = never
    (one,) = steps(TOKENS)[:1]
    await first.send(*step_frames(one))
    (result,) = await told(first, 1)
    assert "the swarm did not say" in result.undelivered


async def test_a_next_peer_with_another_certificate_than_its_record_says(two: Peers, model: SpanModel) -> None:
    async def swapped(peer_id: str, useless: PeerRecord | None) -> PeerRecord:
        return replace(record_of(two.hosts[1]), certificate_der=identity(5).certificate_der)

    first, _ = await two.chain()
    two.links()._resolve = swapped
    await first.send(*step_frames(steps(TOKENS)[0]))
    (result,) = await told(first, 1)
    assert "another certificate is shown than its record names" in result.undelivered
    assert two.hosts[1].house.intake.pushed == 0


async def test_a_next_peer_that_refuses(two: Peers, model: SpanModel) -> None:
    first, second = await two.chain()
    made = steps(TOKENS)
    for one in made[:2]:
        await first.send(*step_frames(one))
    results = await told(second, 2)
    second.edge, second.epoch = secrets.token_bytes(16), 2  # and the peer before it has not heard
    await second.open_again(resume=True)
    await second.route(next_step=2)
    relayed = []
    for one in made[2:]:  # as a client does: the next step when it has the last one's output
        await first.send(*step_frames(one))
        relayed.append(await first.result())
    assert [result.step.step_id for result in relayed] == [2, 3]
    assert all("no session takes steps under that token" in result.undelivered for result in relayed)
    for result in relayed:
        await second.send(*step_frames(replace(result.step, epoch=2)))
    results += await told(second, 2)
    same(results, reference(model, TOKENS, Span(0, 4)))
    assert second.session.tokens == 6


async def test_a_next_peer_that_dies(two: Peers, checkpoint: Path, model: SpanModel) -> None:
    first, second = await two.chain()
    made = steps(TOKENS)
    await first.send(*step_frames(made[0]))
    await second.result()
    assert two.hosts[1]._server is not None
    await two.hosts[1]._server.stop(None)
    await until(lambda: "_Link._hear" not in running(), "the peer before it to notice")
    for one in made[1:]:
        await first.send(*step_frames(one))
    relayed = await told(first, 3)
    assert [result.step.step_id for result in relayed] == [1, 2, 3]
    assert all(result.undelivered for result in relayed)
    same(relayed, reference(model, TOKENS, FIRST)[1:])


def running() -> set[str]:
    """What tasks of this process are at."""
    return {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks() if not task.done()}


@pytest.mark.parametrize("resource", ["messages", "kv"])
async def test_a_full_peer_says_so_and_when_to_come_again(two: Peers, model: SpanModel, resource: str) -> None:
    first, second, host = two.visit(0), two.visit(1), two.hosts[1]
    for visit in (first, second):
        await visit.open(max_tokens=0)
    await second.route()
    await first.route(second)
    (one, *_) = steps(TOKENS)
    if resource == "messages":
        left = host.messages.bytes_left
        host.messages.reserve(left)
        pusher = Pusher(two.stub(1))
        await pusher.push(second.edge, *step_frames(one))
        _, error = await pusher.refusal()
        await first.send(*step_frames(one))
        relayed = await first.result()  # the client hears why, and may bring it later
        assert relayed.undelivered == error.message
        host.messages.release(left)
        await second.send(*step_frames(relayed.step))
        same([await second.result()], reference(model, TOKENS[:1], Span(0, 4)))
    else:
        left = host.budget.tokens_left * len(SECOND)
        host.budget.reserve(left)
        await first.send(*step_frames(one))
        error = await second.refusal()
        host.budget.release(left)
    assert isinstance(error, PeerFull)
    assert error.retryable
    assert error.retry_after_s


async def test_a_replay_that_meets_no_peer_comes_to_the_client_whole(two: Peers, model: SpanModel) -> None:
    """What was handed to a stream is not known to have arrived, so all of it is sent again."""
    first, _ = await two.chain()
    lengths = (400, 400, 1, *[1] * IN_FLIGHT)
    await first.route()
    for one in steps(lengths):
        await first.send(*step_frames(one))
    await told(first, len(lengths))
    pushed: list[int] = []

    def push(peer_id: str, edge: bytes, one: Step) -> asyncio.Future[None]:
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pushed.append(one.step_id)
        if len(pushed) == 1:
            written.set_result(None)
        else:
            written.set_exception(PeerLost("the stream to the next peer had ended"))
        return written

    two.links().push = push  # type: ignore[method-assign,assignment]
    await first.route(two.visit(1))
    relayed = await told(first, 2 + IN_FLIGHT)
    assert pushed == [0, 2]
    assert [result.step.step_id for result in relayed] == [0, 2, *range(3, 3 + IN_FLIGHT)]
    assert [tensor(result).shape[-2] for result in relayed] == [400, 401, *[1] * IN_FLIGHT]
    assert all(result.undelivered == "the stream to the next peer had ended" for result in relayed)
    wanted = torch.cat(reference(model, lengths, FIRST), dim=-2)
    assert torch.equal(torch.cat([tensor(result) for result in relayed], dim=-2), wanted)


# ---------------------------------------------------------------------- a next peer that means no good


Answer = Callable[[pb.PushRequest], Iterable[bytes]]


class Evil:
    """Takes pushes, and answers each with whatever bytes `answer` makes."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.pushed = 0

    async def push(self, requests: AsyncIterator[bytes], context: Any) -> None:
        async for request in requests:
            self.pushed += 1
            for body in self.answer(pb.PushRequest.FromString(request)):
                await context.write(body)


@asynccontextmanager
async def evil_after(one: Peers, answer: Answer) -> AsyncIterator[tuple[Evil, Visit]]:
    """An evil peer, which the first one takes for its next, and a session of which steps go there."""
    who, evil = identity(7), Evil(answer)
    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(evil.push)  # bytes, as they are
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("potluck.Peer", {"Push": method}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(who))
    await server.start()
    record = replace(
        record_of(one.hosts[0]),
        peer_id=who.peer_id,
        addresses=(f"127.0.0.1:{port}",),
        certificate_der=who.certificate_der,
    )

    async def resolved(peer_id: str, useless: PeerRecord | None) -> PeerRecord | None:
        return record if peer_id == who.peer_id else None

    one.links()._resolve = resolved
    try:
        visit = one.visit(0)
        await visit.open()
        await visit.send(Route(1, 0, who.peer_id, secrets.token_bytes(EDGE_BYTES)).to_proto())
        yield evil, visit
    finally:
        one.links().close()
        await until(lambda: not one.links()._links, "the links to end")
        await server.stop(None)


def refusal(edge: bytes, message: str) -> bytes:
    failure = Failure(BadMessage(message), step_id=0).to_proto().failure
    return pb.PushReply(edge=edge, failure=failure).SerializeToString()


async def test_nonsense_from_the_next_peer_ends_its_stream_and_nothing_else(two: Peers, model: SpanModel) -> None:
    made = steps(TOKENS)
    async with evil_after(two, lambda request: [b"\xff" * 9]) as (evil, visit):
        for count, one in enumerate(made[:2], 1):
            await visit.send(*step_frames(one))
            await until(lambda count=count: evil.pushed == count, "the step to arrive")  # type: ignore[misc]
            await until(lambda: "_Link._hear" not in running(), "the stream to end")
        other = two.visit(0)
        await other.open()
        await other.route()
        await other.send(*step_frames(made[0]))
        same([await other.result()], reference(model, TOKENS[:1], FIRST))


async def test_a_next_peer_speaks_for_its_own_edge_only(two: Peers, model: SpanModel) -> None:
    """An edge to the client has no token: who names none must not be heard as the one that takes its outputs."""
    made, other = steps(TOKENS), two.visit(0)
    await other.open()
    await other.route()
    await other.send(*step_frames(made[0]))
    results = [await other.result()]
    async with evil_after(two, lambda r: [refusal(b"", "no"), refusal(r.edge, "truly no")]) as (_, visit):
        await visit.send(*step_frames(made[0]))
        assert (await visit.result()).undelivered == "truly no", "both refusals were heard"
        await other.send(*step_frames(made[1]))
        results.append(await other.result())
    assert [(r.step.step_id, r.undelivered) for r in results] == [(0, ""), (1, "")]
    same(results, reference(model, TOKENS[:2], FIRST))


async def test_a_next_peer_that_refuses_without_a_word_is_not_asked_again(two: Peers, model: SpanModel) -> None:
    async with evil_after(two, lambda request: [refusal(request.edge, "")]) as (evil, visit):
        await visit.send(*step_frames(steps(TOKENS)[0]))
        relayed = await visit.result()
        assert relayed.undelivered
        assert evil.pushed == 1
        same([relayed], reference(model, TOKENS[:1], FIRST))


# ---------------------------------------------------------------------- routes


async def test_outputs_wait_for_a_route(two: Peers, model: SpanModel) -> None:
    visit, last = two.visit(0), len(MANY) - 1
    await visit.open()
    for one in steps(MANY):
        await visit.send(*step_frames(one))
    await until(lambda: visit.session.next_step == last + 1 and is_free(two.hosts[0]), "the steps to be computed")
    assert (await visit.progress()).sent == 0
    await visit.route()
    results = await told(visit, 1 + IN_FLIGHT)
    assert [result.step.step_id for result in results] == [3, *range(4, last + 1)], "all but the recent ones in one"
    wanted = torch.cat(reference(model, MANY, FIRST), dim=-2)
    assert torch.equal(torch.cat([tensor(result) for result in results], dim=-2), wanted)
    assert (await visit.progress()).sent == last + 1


async def test_a_route_of_an_older_epoch_is_refused(two: Peers, model: SpanModel) -> None:
    visit = two.visit(0)
    visit.epoch = 5
    await visit.open()
    await visit.send(*step_frames(replace(steps(TOKENS)[0], epoch=5)))
    await visit.send(Route(4, 0).to_proto())
    assert isinstance(await visit.refusal(), StaleEpoch)
    await visit.route()
    same([await visit.result()], reference(model, TOKENS[:1], FIRST))


async def test_a_route_from_the_first_step_on_tells_everything_again(two: Peers, model: SpanModel) -> None:
    """To whoever is new; recent steps keep their operations, those before them are as the crops left them."""
    visit = two.visit(0)
    await visit.open(batch=2)
    await visit.route()
    sent, position = [], 0
    for step_id, (hidden, ops) in enumerate(
        zip(
            inputs([4, 1, 2, 1, *[1] * IN_FLIGHT], rows=2),
            [(), (CacheOp("reorder", (1, 0)),), *[(CacheOp("crop", (n,)),) for n in (3, 4)], *[()] * IN_FLIGHT],
            strict=True,
        )
    ):
        position = ops[0].values[0] if ops and ops[0].kind == "crop" else position
        sent.append(step(hidden, step_id, position, *ops))
        position += hidden.shape[-2]
    for one in sent:
        await visit.send(*step_frames(one))
    before, last = await told(visit, len(sent)), len(sent) - 1
    assert [result.step.ops for result in before] == [one.ops for one in sent]

    await visit.route(next_step=last - 1)  # to one that has all but the latest two
    assert await told(visit, 2) == before[-2:]

    await visit.route(next_step=0)
    again_told = [await visit.result()]
    while again_told[-1].step.step_id < last:
        again_told.append(await visit.result())
    earlier, recent = again_told[:-IN_FLIGHT], again_told[-IN_FLIGHT:]
    assert recent == before[-IN_FLIGHT:]
    once, again = model.new_cache(SECOND), model.new_cache(SECOND)
    for result in before:
        wanted = applied(model, once, result)
    for result in again_told:
        got = applied(model, again, result)
    assert torch.allclose(got, wanted, atol=1e-5)
    assert again.n_tokens == once.n_tokens
    assert [result.step.position for result in earlier] == sorted(result.step.position for result in earlier)


def applied(model: SpanModel, cache: SpanCache, result: StepResult) -> Tensor:
    """What the next hop makes of a result."""
    for op in result.step.ops:
        cache.apply(SpanOp(op.kind, op.values[0] if op.kind == "crop" else op.values))  # type: ignore[arg-type]
    assert cache.n_tokens == result.step.position
    return model.step(tensor(result), cache, span=SECOND)


async def test_after_the_last_block_only_recent_outputs_are_kept(two: Peers) -> None:
    visit = two.visit(1)
    assert (await visit.open()).kept_from == 0
    await visit.route()
    for one in steps(MANY):
        await visit.send(*step_frames(one))
    results = await told(visit, len(MANY))
    visit.epoch = 2
    kept_from = (await visit.open_again(resume=True)).kept_from
    assert kept_from == len(MANY) - IN_FLIGHT
    await visit.route(next_step=kept_from)
    again = await told(visit, IN_FLIGHT)
    assert [replace(result.step, epoch=1) for result in again] == [result.step for result in results[kept_from:]]
    await visit.route(next_step=kept_from - 1)
    assert isinstance(await visit.refusal(), SessionLost)


class SlowClient(ReplyStream):
    """A client's stream that takes a reply only when it is let."""

    def __init__(self) -> None:
        super().__init__(None, Tally())
        self.is_asked = asyncio.Event()
        self.may_go = asyncio.Event()
        self.heard: list[int] = []

    async def send(self, *replies: pb.InferReply) -> None:
        self.is_asked.set()
        await self.may_go.wait()
        self.heard += [reply.result.step.step_id for reply in replies if reply.WhichOneof("kind") == "result"]


@pytest.mark.parametrize("what", ["a route", "a new epoch"])
async def test_a_way_that_changes_while_an_output_is_under_way(two: Peers, what: str) -> None:
    """Whatever is being sent meanwhile, the new way gets all that it lacks."""
    visit, host = two.visit(0), two.hosts[0]
    await visit.open()
    for one in steps((400, 400, 1)):
        await visit.send(*step_frames(one))
    await until(lambda: visit.session.next_step == 3 and is_free(host), "the steps to be computed")
    session, client = visit.session, SlowClient()
    visit.call.cancel()
    await until(lambda: not host.service._visits, "the client's stream to end")
    pumping = asyncio.create_task(Pump(host.house, session, client).run())
    session.reroute(Route(1, 0))
    await client.is_asked.wait()
    if what == "a new epoch":
        host.sessions.open(visit.opening(epoch=2, resume=True), asyncio.get_running_loop().time())
        client.may_go.set()
        await until(lambda: bool(client.heard), "the output that was under way")
        session.reroute(Route(2, 0))
    else:
        session.reroute(Route(1, 0))
        client.may_go.set()
    await until(lambda: client.heard[-1:] == [2], "the latest output")
    assert client.heard == [0, 0, 1, 2]
    assert not pumping.done()
    pumping.cancel()


# ---------------------------------------------------------------------- streams that end, or come back


async def test_an_idle_link_ends_and_begins_anew(two: Peers, model: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "IDLE_S", 0.1)
    first, second = await two.chain()
    results = []
    for one in steps(TOKENS)[:2]:
        await first.send(*step_frames(one))
        results.append(await second.result())
        await until(lambda: not two.links()._links and "_Link.run" not in running(), "the link to end")
    same(results, reference(model, TOKENS[:2], Span(0, 4)))


async def test_a_client_that_comes_back_takes_its_session_over(two: Peers, model: SpanModel) -> None:
    host, made = two.hosts[1], steps(TOKENS)
    old, pusher = two.visit(1), Pusher(two.stub(1))
    await old.open()
    await old.route()
    await pusher.push(old.edge, *step_frames(made[0]))
    results = [await old.result()]
    half, *_ = cut(made[1], 10)
    await old.send(half)
    await until(lambda: not is_free(host), "half a step on the old stream")

    new = two.visit(1, old.session_id)
    new.epoch = 2
    assert (await new.open(resume=True)).next_step == 1
    with pytest.raises(AssertionError, match="the stream has ended"):
        await old.reply()
    await until(lambda: len(host.service._visits) == 1 and is_free(host), "the old stream to be forgotten")
    assert [name for name in running() if name == "Visit._pump"] == ["Visit._pump"]
    await new.route(next_step=1)
    await pusher.push(new.edge, *step_frames(replace(made[1], epoch=2)))
    results.append(await new.result())
    same(results, reference(model, TOKENS[:2], SECOND))
    assert new.session.attached == 1
    new.call.cancel()
    await until(lambda: not host.service._visits, "the new stream to end")
    assert new.session.attached == 0


async def test_a_step_that_meets_the_end_of_its_session_holds_nothing(two: Peers) -> None:
    """It came after the session was dropped, and before its stream ended."""
    visit, host = two.visit(1), two.hosts[1]
    await visit.open()
    session = visit.session
    host.sessions.close(session)
    host.messages.reserve(100)
    session.deliveries.put_nowait(Delivery(steps(TOKENS)[0], 0.0, 100, pushed=False))
    host.sessions.detach(session, 0.0)
    session.attached += 1  # as it was: the stream is still there
    assert is_free(host)


@pytest.mark.parametrize("end", ["closed", "cancelled", "refused", "not handed on", "half a step"])
async def test_what_a_session_held_is_freed_without_waiting_for_the_collector(two: Peers, end: str) -> None:
    """Cycles would keep caches and payloads for as long as Python sees no need to look for them."""
    first, second = await two.chain()
    (one, *_) = steps(TOKENS)
    gc.collect()
    gc.disable()
    try:
        match end:
            case "refused":
                await first.send(*step_frames(replace(one, position=7)))
                assert isinstance(await first.refusal(), BadMessage)
            case "not handed on":
                two.links()._resolve = nobody
                await first.send(*step_frames(one))
                assert (await first.result()).undelivered
            case "half a step":
                await first.send(next(cut(one, 10)))
            case _:
                await first.send(*step_frames(one))
                await second.result()
        if end == "closed":
            await first.send(Close().to_proto())
        else:
            first.call.cancel()
        await until(lambda: not two.hosts[0].service._visits, "the stream to end")
        two.hosts[0].sessions.reclaim(math.inf)
        first.call = None
        await until(lambda: sessions_in_memory() == 1, "the session to be freed; the second one is still there")
    finally:
        gc.enable()


def sessions_in_memory() -> int:
    return sum(1 for found in gc.get_objects() if type(found) is Session)
