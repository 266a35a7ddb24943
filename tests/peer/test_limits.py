"""What one client cannot do to a peer and its other clients, over real gRPC: each limit, and what happens at it."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from peer import arrival, pushes, replies, visit
from peer.gate import Entry, Lists
from peer.host import SpanHost
from peer.work import Work
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import open_channel
from protocol.credentials import ClientKey, Credentials
from protocol.errors import BadMessage, NotAdmitted, PeerFull, PeerLost, PotluckError, SessionLost
from protocol.frames import Reply, ReplyAssembler, step_frames
from protocol.join_token import JoinToken
from protocol.limits import CHUNK_BYTES, PAYLOAD_BYTES
from protocol.messages import HIDDEN, Close, Failure, Open, Opened, Route, Step, StepResult, TensorSpec
from protocol.receipts import Receipt
from protocol.span import Span
from tensor_codecs import codec
from tests.harness import KnownPeers, open_host, record_of
from tests.tiny import WIDTH
from tests.waiting import until

WAIT_S = 20.0
SPAN = Span(0, 4)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(4)


class Client:
    """A client with a key of its own, driven by hand."""

    def __init__(self, host: SpanHost, token: JoinToken | None = None) -> None:
        self.host = host
        self.key = ClientKey.ephemeral()
        self.known = KnownPeers([], credentials=Credentials(self.key, token))
        self.stub = pb_grpc.PeerStub(self.known.channel(record_of(host)))

    def opening(self, *, signed: bool = True, **changes: object) -> Open:
        fingerprint = self.host.served.fingerprint
        request = Open(secrets.token_bytes(16), 1, fingerprint, SPAN, "none", 1, 0)
        request = replace(request, **changes)  # type: ignore[arg-type]
        return self.known.signed(request, record_of(self.host)) if signed else request

    async def session(self, **changes: object) -> Stream:
        """An open session, whose results come to the client."""
        stream = Stream(self.stub)
        reply = await stream.ask(self.opening(**changes).to_proto())
        assert isinstance(reply, Opened), reply
        await stream.send(Route(1, reply.next_step).to_proto())
        return stream

    async def refusal(self, **changes: object) -> PotluckError:
        return await Stream(self.stub).refusal(self.opening(**changes).to_proto())


class Stream:
    """One `Infer` stream."""

    def __init__(self, stub: pb_grpc.PeerStub) -> None:
        self.call: Any = stub.Infer()
        self.assembler = ReplyAssembler(PAYLOAD_BYTES)

    async def send(self, *messages: pb.InferRequest) -> None:
        async with asyncio.timeout(WAIT_S):
            for message in messages:
                await self.call.write(message)

    async def reply(self) -> Reply | None:
        """None: the stream has ended."""
        async with asyncio.timeout(WAIT_S):
            while (raw := await self.call.read()) is not grpc.aio.EOF:
                if (reply := self.assembler.feed(raw)) is not None:
                    return reply
        return None

    async def ask(self, *messages: pb.InferRequest) -> Reply | None:
        """What comes of them; receipts, which are signed in between, are passed over."""
        await self.send(*messages)
        while isinstance(reply := await self.reply(), Receipt):
            pass
        return reply

    async def refusal(self, *messages: pb.InferRequest) -> PotluckError:
        reply = await self.ask(*messages)
        assert isinstance(reply, Failure), reply
        return reply.error


def step(step_id: int = 0, position: int = 0, tokens: int = 2) -> Step:
    payload = codec("none").encode(torch.ones(1, tokens, WIDTH))
    return Step(
        1, step_id, position, (TensorSpec(HIDDEN, "none", "float32", (1, tokens, WIDTH), len(payload)),), payload
    )


@asynccontextmanager
async def peer(checkpoint: Path, entry: Entry | None = None, **settings: object) -> AsyncIterator[SpanHost]:
    async with open_host(checkpoint, SPAN, entry=entry, **settings) as host:
        yield host


@asynccontextmanager
async def clients(host: SpanHost, *tokens: JoinToken | None) -> AsyncIterator[list[Client]]:
    those = [Client(host, token) for token in tokens]
    try:
        yield those
    finally:
        for each in those:
            await each.known.close()


def account(host: SpanHost, client: Client) -> Any:
    return host.house.gate.accounts.of("", client.key.client_id, time.monotonic())


# ---------------------------------------------------------------------------- who comes in


async def test_a_private_peer_opens_no_session_without_proof(checkpoint: Path) -> None:
    token = JoinToken.new()
    async with peer(checkpoint, Entry(token)) as host, clients(host, None, JoinToken.new(), token) as those:
        bare, wrong, member = those
        for client, words in ((bare, "give its join token"), (wrong, "another one")):
            stream = Stream(client.stub)
            error = await stream.refusal(client.opening().to_proto())
            assert isinstance(error, NotAdmitted) and words in error.message and not error.retryable
            assert await stream.reply() is None, "that is the end of the stream"
        assert isinstance(await bare.refusal(signed=False), NotAdmitted)
        assert isinstance(await (await member.session()).ask(*step_frames(step())), StepResult)
        assert len(host.sessions) == 1


async def test_who_is_denied_opens_no_session(checkpoint: Path) -> None:
    async with peer(checkpoint) as host, clients(host, None, None) as (denied, other):
        host.house.gate._entry = Entry(lists=Lists.of([], [denied.key.client_id]))
        assert isinstance(await denied.refusal(), NotAdmitted)
        await other.session()


async def test_a_session_belongs_to_the_key_that_opened_it(checkpoint: Path) -> None:
    async with peer(checkpoint) as host, clients(host, None, None) as (owner, thief):
        session_id = secrets.token_bytes(16)
        first = await owner.session(session_id=session_id)
        for changes in ({"resume": True}, {"epoch": 2}, {"signed": False, "epoch": 2}):
            error = await thief.refusal(session_id=session_id, **changes)
            assert isinstance(error, NotAdmitted) and "another key" in error.message
        assert isinstance(await first.ask(*step_frames(step())), StepResult)


async def test_what_was_signed_for_one_peer_opens_nothing_on_another(checkpoint: Path) -> None:
    async with peer(checkpoint) as host, open_host(checkpoint, SPAN, index=1) as other, clients(host, None) as (one,):
        elsewhere = pb_grpc.PeerStub(one.known.channel(record_of(other)))
        error = await Stream(elsewhere).refusal(one.opening().to_proto())
        assert isinstance(error, NotAdmitted) and "another peer" in error.message


# ---------------------------------------------------------------------------- how much of it


async def test_a_client_has_so_many_sessions_at_once(checkpoint: Path) -> None:
    async with (
        peer(checkpoint, client_sessions=2, address_keys=2) as host,
        clients(host, None, None) as (greedy, other),
    ):
        streams = [await greedy.session() for _ in range(2)]
        error = await greedy.refusal()
        assert isinstance(error, PeerFull) and error.retry_after_s and "2 sessions here already" in error.message
        await other.session()
        await streams[0].send(Close().to_proto())
        await until(lambda: len(host.sessions) == 2, "the closed session to be gone")
        await greedy.session()


async def test_new_keys_are_of_no_use_to_a_greedy_client(checkpoint: Path) -> None:
    async with (
        peer(checkpoint, client_sessions=1, address_keys=2) as host,
        clients(host, *[None] * 6) as those,
    ):
        opened = [await Stream(each.stub).ask(each.opening().to_proto()) for each in those]
        # Two keys, and one account that all the others share with whoever signs nothing.
        assert [isinstance(reply, Opened) for reply in opened] == [True] * 3 + [False] * 3
        assert isinstance(await those[0].refusal(signed=False), PeerFull)


async def test_sessions_are_opened_at_a_rate(checkpoint: Path) -> None:
    async with peer(checkpoint, client_opens_per_s=0.5) as host, clients(host, None, None) as (greedy, other):
        account(host, greedy).opens.take(99.0, time.monotonic())
        await greedy.session()
        error = await greedy.refusal()
        assert isinstance(error, PeerFull) and error.retry_after_s == pytest.approx(2.0, abs=1.5)
        await other.session()


async def test_whoever_fills_the_cache_makes_room_when_others_come(checkpoint: Path) -> None:
    async with peer(checkpoint, kv_tokens=1000) as host, clients(host, None, None) as (greedy, polite):
        streams = [await greedy.session(max_tokens=100) for _ in range(9)]
        assert isinstance(await greedy.refusal(max_tokens=100), PeerFull), "alone, it may fill it, and no more"
        mine = await polite.session(max_tokens=300)
        assert host.sessions.preempted == 3 and len(host.sessions) == 7
        ended = [await stream.reply() for stream in streams[-3:]]
        assert ended == [None] * 3, "the newest hear it by the end of their streams"
        error = await greedy.refusal(max_tokens=100)
        assert isinstance(error, PeerFull) and "50% of this peer's cache" in error.message
        assert isinstance(await mine.ask(*step_frames(step())), StepResult)
        assert isinstance(await streams[0].ask(*step_frames(step())), StepResult)
        assert await polite.session(max_tokens=200)
        assert host.sessions.preempted == 4


async def test_steps_under_way_are_bounded_for_each_client(checkpoint: Path) -> None:
    async with peer(checkpoint, client_sessions=1, max_step_tokens=16) as host, clients(host, None, None) as those:
        greedy, polite = those
        stream, other = await greedy.session(), await polite.session()
        held = account(host, greedy)
        held.hold(0, 15, 0)
        error = await stream.refusal(*step_frames(step()))
        assert isinstance(error, PeerFull) and "15 tokens under way, of 16 at most" in error.message
        assert isinstance(await other.ask(*step_frames(step())), StepResult)
        held.release(0, 15)
        assert (held.tokens, held.nbytes) == (0, 0) == (account(host, polite).tokens, account(host, polite).nbytes)
        assert host.messages.bytes_left == host.messages.bytes_total


async def test_one_client_has_a_part_of_the_memory_for_steps(checkpoint: Path) -> None:
    async with peer(checkpoint, message_mib=1, max_step_tokens=4096) as host, clients(host, None, None) as those:
        greedy, polite = those
        stream = await greedy.session()
        half = host.messages.bytes_total // 2
        account(host, greedy).hold(half, 1, half)
        assert isinstance(await stream.ask(*step_frames(step())), StepResult), "alone it may have all"
        other = await polite.session()
        error = await (await greedy.session()).refusal(*step_frames(step()))
        assert isinstance(error, PeerFull) and "0 MiB at most while others have sessions" in error.message
        assert isinstance(await other.ask(*step_frames(step())), StepResult)


async def test_who_sends_much_is_read_slowly(checkpoint: Path) -> None:
    async with (
        peer(checkpoint, client_mib_s=0.25, kv_tokens=20_000, max_step_tokens=4096) as host,
        clients(host, None, None) as (greedy, polite),
    ):
        stream, other = await greedy.session(), await polite.session()
        began_s = time.monotonic()
        sending = asyncio.create_task(stream.ask(*step_frames(step(tokens=2048))))  # twice what comes in a second
        assert isinstance(await other.ask(*step_frames(step())), StepResult)
        assert not sending.done()
        assert isinstance(await sending, StepResult)
        assert time.monotonic() - began_s > 0.4, "a chunk is read when those before it are paid for"


async def test_pushes_are_on_the_account_of_the_sessions_client(checkpoint: Path) -> None:
    """Whoever opened a session knows its edge, and could push there itself."""
    async with peer(checkpoint, client_mib_s=0.25) as host, clients(host, None) as (greedy,):
        edge = secrets.token_bytes(16)
        await greedy.session(edge=edge)
        account(host, greedy).traffic.take(7 * (1 << 18), time.monotonic())
        call: Any = greedy.stub.Push()
        await call.write(pb.PushRequest(edge=edge, request=next(iter(step_frames(step())))))
        failure = Failure.from_proto((await call.read()).failure)
        assert isinstance(failure.error, PeerFull) and failure.error.retry_after_s == pytest.approx(6.0, abs=0.9)
        call.cancel()


async def test_streams_from_one_address_are_counted(checkpoint: Path) -> None:
    async with peer(checkpoint, address_streams=3) as host, clients(host, None) as (greedy,):
        streams = [await greedy.session() for _ in range(3)]
        with pytest.raises(grpc.aio.AioRpcError, match="3 streams from one address") as caught:
            await Stream(greedy.stub).ask(greedy.opening().to_proto())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await streams[0].send(Close().to_proto())
        assert await streams[0].reply() is None
        await until(lambda: sum(host.house.gate.accounts._streams.values()) == 2, "the stream to be counted out")
        await greedy.session()


# ---------------------------------------------------------------------------- who is slow, or idle


async def test_a_stream_that_opens_nothing_is_cut_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "OPEN_S", 0.5)
    async with peer(checkpoint) as host, clients(host, None) as (idle,):
        silent = Stream(idle.stub)
        await until(lambda: bool(host.house.gate.accounts._streams), "the stream to be there")
        error = await silent.refusal()
        assert isinstance(error, PeerLost) and "an opening did not come in time" in error.message
        assert await silent.reply() is None
        await until(lambda: not host.house.gate.accounts._streams, "the stream to be gone")
        resting = await idle.session()
        await asyncio.sleep(0.8)
        assert isinstance(await resting.ask(*step_frames(step())), StepResult), "with a session, one may rest"


async def test_a_step_that_stops_coming_is_cut_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "STALL_S", 0.2)
    async with (
        peer(checkpoint, kv_tokens=20_000, max_step_tokens=4096) as host,
        clients(host, None) as (slow,),
    ):
        stream = await slow.session()
        first, *_ = step_frames(step(tokens=4096))
        error = await stream.refusal(first)
        assert isinstance(error, PeerLost) and "the rest of a step did not come in time" in error.message
        assert await stream.reply() is None
        assert host.messages.bytes_left == host.messages.bytes_total
        assert account(host, slow).nbytes == account(host, slow).tokens == 0


async def test_a_step_that_drips_is_cut_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is not silence; but so slow no line is."""
    monkeypatch.setattr(arrival, "STALL_S", 0.3)
    monkeypatch.setattr(arrival, "SLOWEST_BYTES_S", 1 << 30)
    async with (
        peer(checkpoint, kv_tokens=20_000, max_step_tokens=4096) as host,
        clients(host, None) as (slow,),
    ):
        stream = await slow.session()
        first, *_ = step_frames(step(tokens=4096))

        async def drip() -> None:
            await stream.send(first)
            while True:
                await stream.send(pb.InferRequest(more=pb.More(), chunk=b"x"))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        reply = await stream.reply()
        assert isinstance(reply, Failure) and isinstance(reply.error, PeerLost)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        assert host.messages.bytes_left == host.messages.bytes_total


async def test_a_client_that_reads_nothing_is_cut_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "SEND_TIMEOUT_S", 0.3)
    async with (
        peer(checkpoint, kv_tokens=40_000, max_step_tokens=4096) as host,
        clients(host, None) as (deaf,),
    ):
        stream = await deaf.session()

        async def ask_on() -> None:
            for number in itertools.count():
                await stream.send(*step_frames(step(number, number * 2048, 2048)))

        asking = asyncio.create_task(ask_on())
        await until(lambda: host.house.intake.begun > 1, "steps to come")
        await until(lambda: not host.house.gate.accounts._streams, "the stream to be gone")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        session = next(iter(host.sessions))
        assert session.attached == 0, "it waits for its client as one that lost its connection"
        assert host.sessions.reclaim(time.monotonic() + host._config.resume_s + 1.0) == 1
        assert host.messages.bytes_left == host.messages.bytes_total


async def test_a_session_without_steps_is_dropped_and_its_stream_ends(checkpoint: Path) -> None:
    async with peer(checkpoint) as host, clients(host, None) as (idle,):
        stream = await idle.session()
        assert host.sessions.reclaim(time.monotonic() + host._config.session_idle_s - 1.0) == 0
        assert host.sessions.reclaim(time.monotonic() + host._config.session_idle_s + 1.0) == 1
        assert await stream.reply() is None
        assert not host.house.gate.accounts._streams
        assert isinstance(await idle.refusal(resume=True), SessionLost)


async def test_pushes_that_nobody_takes_are_not_answered_for_ever(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "MOST_REFUSED", 8)
    async with peer(checkpoint) as host, clients(host, None) as (stranger,):
        call: Any = stranger.stub.Push()
        frame = next(iter(step_frames(step())))
        for _ in range(8):
            await call.write(pb.PushRequest(edge=secrets.token_bytes(16), request=frame))
        answers = 0
        async with asyncio.timeout(WAIT_S):
            while await call.read() is not grpc.aio.EOF:
                answers += 1
        assert answers == 8
        await until(lambda: not host.house.gate.accounts._streams, "the stream to be gone")


async def test_a_push_that_stops_coming_is_cut_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "STALL_S", 0.2)
    async with (
        peer(checkpoint, kv_tokens=20_000, max_step_tokens=4096) as host,
        clients(host, None) as (owner,),
    ):
        edge = secrets.token_bytes(16)
        await owner.session(edge=edge)
        call: Any = owner.stub.Push()
        first, *_ = step_frames(step(tokens=4096))
        await call.write(pb.PushRequest(edge=edge, request=first))
        await until(lambda: host.messages.bytes_left < host.messages.bytes_total, "the step to begin")
        async with asyncio.timeout(WAIT_S):
            assert await call.read() is grpc.aio.EOF
        assert host.messages.bytes_left == host.messages.bytes_total and account(host, owner).tokens == 0


async def test_a_message_over_the_limit_is_refused(checkpoint: Path) -> None:
    async with peer(checkpoint) as host, clients(host, None) as (greedy,):
        record = record_of(host)
        channel = open_channel(record.addresses[0], record.certificate_der, max_message_bytes=1 << 20)
        with pytest.raises(grpc.aio.AioRpcError, match="Received message larger than max"):
            await Stream(pb_grpc.PeerStub(channel)).ask(pb.InferRequest(more=pb.More(), chunk=bytes(2 * CHUNK_BYTES)))
        await channel.close()
        error = await (await greedy.session()).refusal(pb.InferRequest(step=pb.Step(payload_bytes=PAYLOAD_BYTES + 1)))
        assert isinstance(error, BadMessage)
        assert host.messages.bytes_left == host.messages.bytes_total


# ---------------------------------------------------------------------------- fair between clients

PASS_S, TOKEN_S = 0.02, 0.00125  # of a device that takes so long for a pass, and for each token in it


@pytest.mark.slow  # it compares times
async def test_a_greedy_client_does_not_double_another_ones_time_between_tokens(checkpoint: Path) -> None:
    """It opens sessions as fast as it can, sends a prompt in each, and asks on. The peer's device is a slow one:
    what is compared is what the peer does, not what this machine is busy with."""
    async with peer(checkpoint, kv_tokens=60_000, max_step_tokens=2048) as host, clients(host, None, None) as those:
        greedy, polite = those
        run = host.engine._worker.run

        def slow(work: list[tuple[Work, int]]) -> None:
            began_s = time.perf_counter()
            run(work)
            wanted_s = PASS_S + TOKEN_S * sum(each.rows * tokens for each, tokens in work)
            time.sleep(max(0.0, wanted_s - (time.perf_counter() - began_s)))

        host.engine._worker.run = slow  # type: ignore[assignment, method-assign]
        stream = await polite.session()
        await stream.ask(*step_frames(step(0, 0, 64)))
        alone_s = await between_tokens_s(stream, 25, first=1)
        flood = asyncio.create_task(flooding(greedy))
        try:
            await until(lambda: host.tally.refusals["peer-full"] >= 100, "the flood")
            beside_s = await between_tokens_s(stream, 60, first=26)
        finally:
            flood.cancel()
            await asyncio.gather(flood, return_exceptions=True)
        assert host.sessions.opened > 60, "it went on opening"
        assert median(alone_s) > PASS_S
        print(f"\n{median(alone_s) * 1e3:.1f} ms alone, {median(beside_s) * 1e3:.1f} ms beside the flood")
        assert median(beside_s) <= 2.0 * median(alone_s), (median(alone_s), median(beside_s))


async def between_tokens_s(stream: Stream, tokens: int, first: int) -> list[float]:
    """The times between so many tokens of an answer."""
    times_s, before_s = [], time.perf_counter()
    for number in range(first, first + tokens):
        assert isinstance(await stream.ask(*step_frames(step(number, 63 + number, 1))), StepResult)
        times_s.append(time.perf_counter() - before_s)
        before_s += times_s[-1]
    return times_s


async def flooding(client: Client) -> None:
    """Sessions as fast as they can be opened, each with a prompt and the tokens after it, until it is cancelled."""

    async def one() -> None:
        stream = Stream(client.stub)
        try:
            if not isinstance(await stream.ask(client.opening().to_proto()), Opened):
                return
            await stream.send(Route(1, 0).to_proto(), *step_frames(step(0, 0, 256)))
            await stream.reply()
            for number in range(1, 100):
                await stream.ask(*step_frames(step(number, 255 + number, 1)))
            await stream.send(Close().to_proto())
        finally:
            stream.call.cancel()

    async with asyncio.TaskGroup() as tasks:
        running: set[asyncio.Task[None]] = set()
        while True:
            running = {task for task in running if not task.done()}
            if len(running) < 80:
                running.add(tasks.create_task(one()))
            await asyncio.sleep(0.002)
