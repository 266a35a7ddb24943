"""Messages and frames: what is cut is put together again, and nonsense is a WireError before memory is taken."""

import contextlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, PeerFull, VersionMismatch, WireError
from protocol.frames import ReplyAssembler, RequestAssembler, result_frames, step_frames
from protocol.limits import CHUNK_BYTES, EDGE_BYTES, MAX_TENSORS, MAX_TRACE, PAYLOAD_BYTES, WIRE_VERSION
from protocol.messages import (
    CacheOp,
    Close,
    Failure,
    HopTrace,
    Notice,
    Open,
    Opened,
    Progress,
    Route,
    Step,
    StepResult,
    TensorSpec,
)
from protocol.span import Span


def _step(nbytes: int, parts: int = 1) -> Step:
    sizes = [nbytes // parts] * (parts - 1) + [nbytes - nbytes // parts * (parts - 1)]
    specs = tuple(TensorSpec("hidden", "int8", "float32", (1, 1, n), n) for n in sizes)
    payload = bytes(i % 251 for i in range(nbytes))
    trace = (HopTrace(0, 0.5, 1.5, 99), HopTrace(4, 0.0, 2.0, 7))
    return Step(3, 5, 7, specs, payload, (CacheOp("crop", (6,)), CacheOp("reorder", (1, 0))), trace)


@given(st.integers(0, 3 * CHUNK_BYTES), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_step_crosses_whole(nbytes: int, parts: int) -> None:
    step, assembler = _step(nbytes, parts), RequestAssembler(PAYLOAD_BYTES)
    frames = [pb.InferRequest.FromString(f.SerializeToString()) for f in step_frames(step)]
    assert all(f.ByteSize() <= CHUNK_BYTES + 1024 for f in frames)
    received = [assembler.feed(f) for f in frames]
    assert received[:-1] == [None] * (len(frames) - 1)
    assert received[-1] == step


@given(st.integers(0, 3 * CHUNK_BYTES))
@settings(max_examples=20, deadline=None)
def test_a_result_crosses_whole(nbytes: int) -> None:
    result = StepResult(_step(nbytes), "the next peer cannot be reached")
    assembler = ReplyAssembler(PAYLOAD_BYTES)
    received = [assembler.feed(pb.InferReply.FromString(f.SerializeToString())) for f in result_frames(result)]
    assert received[-1] == result
    assert [bytes(view) for _, view in result.step.parts()] == [result.step.payload]


def test_small_messages_cross() -> None:
    opening = Open(bytes(16), 2, "f" * 64, Span(3, 9), "int8", 4, 100, resume=True, edge=bytes(EDGE_BYTES))
    requests, replies = RequestAssembler(1024), ReplyAssembler(1024)
    assert requests.feed(opening.to_proto()) == opening
    assert requests.feed(Close().to_proto()) == Close()
    for route in (Route(2, 5), Route(2, 0, "QmNext", bytes(EDGE_BYTES))):
        assert requests.feed(route.to_proto()) == route
    progress = Progress(3, 8, 7, 6, 1 << 20, 2, 12.5)
    assert Progress.from_proto(progress.to_proto()) == progress
    opened = Opened(4, 17, 1000, "float32", kept_from=2)
    assert replies.feed(opened.to_proto()) == opened
    assert replies.feed(Notice("draining", 5.0).to_proto()) == Notice("draining", 5.0)
    failure = replies.feed(Failure(PeerFull("full", retry_after_s=2.0), step_id=3).to_proto())
    assert isinstance(failure, Failure) and isinstance(failure.error, PeerFull)
    assert (failure.error.retry_after_s, failure.step_id, failure.error.retryable) == (2.0, 3, True)


def test_versions_must_agree() -> None:
    message = Open(bytes(16), 1, "f", Span(0, 1), "int8", 1, 1).to_proto()
    message.open.wire_version = WIRE_VERSION + 1
    with pytest.raises(VersionMismatch, match="this side is older"):
        RequestAssembler(1024).feed(message)


def _broken() -> list[tuple[str, list[pb.InferRequest]]]:
    whole = list(step_frames(_step(2 * CHUNK_BYTES + 5)))
    more = pb.InferRequest(more=pb.More(), chunk=b"x")
    spec = pb.Tensor(name="hidden", codec="int8", dtype="float32", shape=[1], nbytes=1)

    def step(**changes: object) -> pb.InferRequest:
        fields: dict[str, object] = {"tensors": [spec], "payload_bytes": 1} | changes
        return pb.InferRequest(step=pb.Step(**fields), chunk=b"x")

    return [
        ("empty", [pb.InferRequest()]),
        ("continuation of nothing", [more]),
        ("step inside a step", [whole[0], whole[0]]),
        ("too much payload", [whole[0], whole[1], whole[2], more]),
        ("empty continuation", [whole[0], pb.InferRequest(more=pb.More())]),
        ("larger than the limit", [step(payload_bytes=PAYLOAD_BYTES + 1)]),
        ("sizes do not add up", [step(payload_bytes=2)]),
        ("too many tensors", [step(tensors=[spec] * (MAX_TENSORS + 1), payload_bytes=MAX_TENSORS + 1)]),
        ("too many dims", [step(tensors=[pb.Tensor(name="h", shape=[1] * 9, nbytes=1)])]),
        ("huge shape", [step(tensors=[pb.Tensor(name="h", shape=[1 << 24, 1 << 24], nbytes=1)])]),
        ("nameless", [step(tensors=[pb.Tensor(shape=[1], nbytes=1)])]),
        ("unknown op", [step(ops=[pb.CacheOp(kind="explode")])]),
        ("crop without value", [step(ops=[pb.CacheOp(kind="crop")])]),
        ("too many ops", [step(ops=[pb.CacheOp(kind="reset")] * 99)]),
        ("too many hops", [step(trace=[pb.HopTrace()] * (MAX_TRACE + 1))]),
        ("a time that is none", [step(trace=[pb.HopTrace(queue_ms=float("nan"))])]),
        ("route without a token", [pb.InferRequest(route=pb.Route(peer_id="QmNext"))]),
        ("route with a short token", [pb.InferRequest(route=pb.Route(edge=b"x"))]),
        ("route to a very long name", [pb.InferRequest(route=pb.Route(peer_id="Q" * 99, edge=bytes(EDGE_BYTES)))]),
        (
            "short edge token",
            [
                pb.InferRequest(
                    open=pb.Open(wire_version=WIRE_VERSION, session_id=bytes(16), stop=1, batch=1, edge=b"x")
                )
            ],
        ),
        ("short session id", [pb.InferRequest(open=pb.Open(wire_version=WIRE_VERSION, session_id=b"x", stop=1))]),
        ("empty span", [pb.InferRequest(open=pb.Open(wire_version=WIRE_VERSION, session_id=bytes(16)))]),
        ("no rows", [pb.InferRequest(open=pb.Open(wire_version=WIRE_VERSION, session_id=bytes(16), stop=1))]),
    ]


@pytest.mark.parametrize(("what", "frames"), _broken(), ids=[name for name, _ in _broken()])
def test_nonsense_is_a_bad_message(what: str, frames: list[pb.InferRequest]) -> None:
    assembler = RequestAssembler(PAYLOAD_BYTES)
    with pytest.raises(BadMessage):
        for frame in frames:
            assembler.feed(frame)


@given(st.lists(st.binary(max_size=200), max_size=6))
@settings(max_examples=300, deadline=None)
def test_random_messages_raise_nothing_but_wire_errors(blobs: list[bytes]) -> None:
    requests, replies = RequestAssembler(1 << 16), ReplyAssembler(1 << 16)
    for blob in blobs:
        for message, assembler in ((pb.InferRequest(), requests), (pb.InferReply(), replies)):
            try:
                message.ParseFromString(blob)
            except DecodeError:
                continue
            with contextlib.suppress(WireError):
                assembler.feed(message)  # type: ignore[attr-defined]
