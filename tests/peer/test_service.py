"""What a peer answers to ill-formed requests: a typed refusal on that stream, and nothing on the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch

from peer.host import SpanHost
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import BadMessage, PeerDraining, PeerFull, PotluckError, SessionLost, WireError, WrongModel
from protocol.frames import Reply, ReplyAssembler, step_frames
from protocol.limits import CHUNK_BYTES, PAYLOAD_BYTES, WIRE_VERSION
from protocol.messages import (
    ATTENTION_MASK,
    HIDDEN,
    POSITION_IDS,
    CacheOp,
    Failure,
    Notice,
    Open,
    Opened,
    Route,
    Step,
    StepResult,
)
from protocol.messages import TensorSpec as Spec
from protocol.span import Span
from tensor_codecs import codec, dtype_name
from tests.harness import KnownPeers, open_host, record_of
from tests.tiny import WIDTH


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(4)


class Stream:
    """One `Infer` stream, driven by hand."""

    def __init__(self, stub: pb_grpc.PeerStub) -> None:
        self.call = stub.Infer()
        self.assembler = ReplyAssembler(PAYLOAD_BYTES)

    async def send(self, *messages: pb.InferRequest) -> Reply:
        for message in messages:
            await self.call.write(message)
        while True:
            raw = await self.call.read()
            assert raw is not grpc.aio.EOF
            reply = self.assembler.feed(raw)
            if isinstance(reply, Opened):
                await self.call.write(Route(1, reply.next_step).to_proto())  # outputs to this client
            if reply is not None:
                return reply

    async def refusal(self, *messages: pb.InferRequest) -> PotluckError:
        reply = await self.send(*messages)
        assert isinstance(reply, Failure), reply
        return reply.error


@pytest.fixture
async def host(checkpoint: Path) -> AsyncIterator[SpanHost]:
    async with open_host(checkpoint, Span(1, 4), max_step_tokens=64) as host:
        yield host


@pytest.fixture
async def stub(host: SpanHost) -> AsyncIterator[pb_grpc.PeerStub]:
    known = KnownPeers([])
    yield pb_grpc.PeerStub(known.channel(record_of(host)))
    await known.close()


def opening(host: SpanHost, tag: int = 1, **changes: object) -> Open:
    request = Open(bytes([tag]) * 16, 1, host.served.fingerprint, Span(1, 4), "none", 1, 32)
    return replace(request, **changes)  # type: ignore[arg-type]


def step(step_id: int = 0, position: int = 0, tokens: int = 2, **changes: object) -> Step:
    hidden = torch.ones(1, tokens, WIDTH)
    payload = codec("none").encode(hidden)
    spec = Spec(HIDDEN, "none", "float32", (1, tokens, WIDTH), len(payload))
    return replace(Step(1, step_id, position, (spec,), payload), **changes)  # type: ignore[arg-type]


def with_tensor(name: str, tensor: torch.Tensor) -> Step:
    base = step()
    payload = codec("none").encode(tensor)
    spec = Spec(name, "none", dtype_name(tensor.dtype), tuple(tensor.shape), len(payload))
    return replace(base, tensors=(*base.tensors, spec), payload=base.payload + payload)


HIDDEN_SPEC = step().tensors[0]
ILL_FORMED = {
    "wrong position": step(position=1),
    "no hidden states": step(tensors=(), payload=b""),
    "wrong width": step(
        tensors=(Spec(HIDDEN, "none", "float32", (1, 4, WIDTH // 2), 2 * WIDTH * 4),), payload=bytes(2 * WIDTH * 4)
    ),
    "two dimensions": step(
        tensors=(Spec(HIDDEN, "none", "float32", (2, WIDTH), 2 * WIDTH * 4),), payload=bytes(2 * WIDTH * 4)
    ),
    "payload and shape differ": step(tensors=(replace(HIDDEN_SPEC, shape=(1, 3, WIDTH)),)),
    "unknown codec": step(tensors=(replace(HIDDEN_SPEC, codec="zip"),)),
    "unknown dtype": step(tensors=(replace(HIDDEN_SPEC, dtype="object"),)),
    "more kept than there is": step(tensors=(replace(HIDDEN_SPEC, keep=9),)),
    "no tokens": step(tokens=0),
    "too many tokens": step(tokens=65),
    "unknown input": with_tensor("weights", torch.zeros(1, 2)),
    "mask of the wrong size": with_tensor(ATTENTION_MASK, torch.ones(1, 9, dtype=torch.bool)),
    "positions of the wrong size": with_tensor(POSITION_IDS, torch.zeros(1, 9, dtype=torch.int64)),
    "positions that are no numbers": with_tensor(POSITION_IDS, torch.zeros(1, 2)),
    "reorder of rows that are not there": step(ops=(CacheOp("reorder", (0, 7)),)),
    "crop to more than there is": step(ops=(CacheOp("crop", (9,)),)),
    "other number of rows": step(
        tensors=(Spec(HIDDEN, "none", "float32", (2, 1, WIDTH), 2 * WIDTH * 4),),
        step_id=1,
        position=2,
    ),
}


@pytest.mark.parametrize("what", ILL_FORMED, ids=list(ILL_FORMED))
async def test_an_ill_formed_step_is_refused_and_harms_nobody(
    host: SpanHost, stub: pb_grpc.PeerStub, what: str
) -> None:
    victim, other = Stream(stub), Stream(stub)
    assert isinstance(await other.send(opening(host, tag=2).to_proto()), Opened)
    reference = await other.send(*step_frames(step()))
    assert isinstance(reference, StepResult)

    assert isinstance(await victim.send(opening(host).to_proto()), Opened)
    bad = ILL_FORMED[what]
    if bad.step_id:
        await victim.send(*step_frames(step()))
    error = await victim.refusal(*step_frames(bad))
    assert isinstance(error, WireError), error
    assert "Traceback" not in error.message

    assert isinstance(await other.send(*step_frames(step(1, 2, 1))), StepResult)
    fresh = Stream(stub)
    assert isinstance(await fresh.send(opening(host, tag=3).to_proto()), Opened)
    again = await fresh.send(*step_frames(step()))
    assert isinstance(again, StepResult) and again.step.payload == reference.step.payload


async def test_an_application_order_is_kept(host: SpanHost, stub: pb_grpc.PeerStub) -> None:
    assert isinstance(await Stream(stub).refusal(*step_frames(step())), BadMessage), "a step before Open"
    stream = Stream(stub)
    await stream.send(opening(host).to_proto())
    assert isinstance(await stream.refusal(opening(host).to_proto()), BadMessage), "one session per stream"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"fingerprint": "other"}, WrongModel),
        ({"span": Span(0, 4)}, WrongModel),
        ({"span": Span(3, 9)}, WrongModel),
        ({"resume": True}, SessionLost),
        ({"max_tokens": 1 << 30}, PeerFull),
    ],
    ids=str,
)
async def test_a_session_that_cannot_be_is_refused(
    host: SpanHost, stub: pb_grpc.PeerStub, changes: dict[str, object], error: type[PotluckError]
) -> None:
    assert isinstance(await Stream(stub).refusal(opening(host, **changes).to_proto()), error)
    assert host.budget.tokens_left == host.budget.tokens_total


async def test_another_session_of_the_same_id_is_not_taken_over(host: SpanHost, stub: pb_grpc.PeerStub) -> None:
    first = Stream(stub)
    await first.send(opening(host).to_proto())
    assert isinstance(await Stream(stub).refusal(opening(host).to_proto()), BadMessage)
    assert isinstance(await first.send(*step_frames(step())), StepResult)


async def test_a_draining_peer_takes_no_new_sessions_and_ends_old_ones_properly(
    host: SpanHost, stub: pb_grpc.PeerStub
) -> None:
    stream = Stream(stub)
    await stream.send(opening(host).to_proto())
    host.drain()
    assert isinstance(await Stream(stub).refusal(opening(host, tag=9).to_proto()), PeerDraining)
    assert await stream.send() == Notice("draining"), "clients are told"
    assert isinstance(await stream.send(*step_frames(step())), StepResult)


async def test_messages_have_a_budget(host: SpanHost, stub: pb_grpc.PeerStub) -> None:
    host.messages.reserve(host.messages.bytes_left - 100)
    stream = Stream(stub)
    await stream.send(opening(host).to_proto())
    error = await stream.refusal(*step_frames(step()))
    assert isinstance(error, PeerFull) and error.retryable and error.retry_after_s
    assert host.messages.bytes_left == 100
    host.messages.release(host.messages.bytes_total - 100)
    resumed = Stream(stub)
    assert isinstance(await resumed.send(opening(host, resume=True).to_proto()), Opened)
    assert isinstance(await resumed.send(*step_frames(step())), StepResult)
    assert host.messages.bytes_left == host.messages.bytes_total


async def test_a_step_in_many_chunks(checkpoint: Path) -> None:
    async with open_host(checkpoint, Span(1, 4), kv_tokens=20000, max_step_tokens=20000) as host:
        known = KnownPeers([])
        stream = Stream(pb_grpc.PeerStub(known.channel(record_of(host))))
        await stream.send(opening(host, max_tokens=9000).to_proto())
        frames = list(step_frames(step(tokens=9000)))
        assert len(frames) == -(-9000 * WIDTH * 4 // CHUNK_BYTES) > 1
        result = await stream.send(*frames)
        assert isinstance(result, StepResult) and len(result.step.payload) == 9000 * WIDTH * 4
        await known.close()


async def test_a_long_step_that_is_refused_by_its_header_hears_why(host: SpanHost, stub: pb_grpc.PeerStub) -> None:
    stream = Stream(stub)
    await stream.send(opening(host).to_proto())
    frames = list(step_frames(step(tokens=40_000)))
    assert len(frames) > 8
    error = await stream.refusal(*frames)
    assert isinstance(error, BadMessage) and "smaller chunks" in error.message


async def test_describe_and_ping(host: SpanHost, stub: pb_grpc.PeerStub) -> None:
    description = await stub.Describe(pb.DescribeRequest(wire_version=WIRE_VERSION))
    assert (description.start, description.stop, description.n_blocks) == (1, 4, 4)
    assert description.codecs[0] == "int8"
    with pytest.raises(grpc.aio.AioRpcError, match="older"):
        await stub.Describe(pb.DescribeRequest(wire_version=WIRE_VERSION + 1))
    assert (await stub.Ping(pb.PingRequest(payload=b"x" * 100))).payload == b"x" * 100
    with pytest.raises(grpc.aio.AioRpcError, match="a ping carries"):
        await stub.Ping(pb.PingRequest(payload=bytes(70000)))
