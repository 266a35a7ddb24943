"""Every message of the protocol, from bytes to the frozen value.

Allowed: `WireError`; bytes that are no protobuf end before. What is read can be said again, and is read as the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from protocol import potluck_pb2 as pb
from protocol.errors import PeerFull, WireError
from protocol.limits import MAX_ERROR_CHARS, MAX_PEER_ID_CHARS
from protocol.messages import (
    CacheOp,
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
    check_tensors,
)
from protocol.span import Span
from tests.fuzz.target import Target

EDGE, SESSION = b"e" * 16, b"s" * 16
TENSOR = TensorSpec("hidden", "none", "float32", (1, 1, 2), 8)
TRACE = HopTrace(3, 0.5, 1.5, 100)
STEP = Step(1, 2, 3, (TENSOR,), bytes(8), (CacheOp("crop", (3,)), CacheOp("reset")), (TRACE,))


def _tensor(message: Any) -> None:
    spec = TensorSpec.from_proto(message)
    assert TensorSpec.from_proto(spec.to_proto()) == spec


def _op(message: Any) -> None:
    op = CacheOp.from_proto(message)
    assert CacheOp.from_proto(pb.CacheOp(kind=op.kind, values=op.values)) == op


def _open(message: Any) -> None:
    opening = Open.from_proto(message)
    assert Open.from_proto(opening.to_proto().open) == opening


def _opened(message: Any) -> None:
    opened = Opened.from_proto(message)
    assert Opened.from_proto(opened.to_proto().opened) == opened


def _route(message: Any) -> None:
    route = Route.from_proto(message)
    assert Route.from_proto(route.to_proto().route) == route


def _trace(message: Any) -> None:
    trace = HopTrace.from_proto(message)
    assert HopTrace.from_proto(trace.to_proto()) == trace


def _step(message: Any) -> None:
    payload = bytes(min(message.payload_bytes, 1 << 16))
    step = Step.from_proto(message, payload)
    assert sum(len(part) for _, part in step.parts()) == len(payload)
    if len(payload) == message.payload_bytes:
        assert Step.from_proto(step.header(), payload) == step


def _result(message: Any) -> None:
    payload = bytes(min(message.step.payload_bytes, 1 << 16))
    result = StepResult.from_proto(message, payload)
    assert result.undelivered.isprintable()
    if len(payload) == message.step.payload_bytes:
        assert StepResult.from_proto(result.header(), payload) == result


def _progress(message: Any) -> None:
    progress = Progress.from_proto(message)
    assert Progress.from_proto(progress.to_proto()) == progress


def _notice(message: Any) -> None:
    notice = Notice.from_proto(message)
    assert Notice.from_proto(notice.to_proto().notice) == notice


def _failure(message: Any) -> None:
    failure = Failure.from_proto(message)
    error = failure.error
    assert len(error.message) <= MAX_ERROR_CHARS and error.message.isprintable()
    assert error.peer_id is None or len(error.peer_id) <= MAX_PEER_ID_CHARS
    assert error.retry_after_s is None or 0 < error.retry_after_s < float("inf")
    again = failure.to_proto()
    assert Failure.from_proto(again.failure).to_proto() == again


def _request(message: Any) -> None:
    kind = message.WhichOneof("kind")
    if kind in _OF_REQUESTS:
        _OF_REQUESTS[kind](getattr(message, kind))


def _reply(message: Any) -> None:
    kind = message.WhichOneof("kind")
    if kind in _OF_REPLIES:
        _OF_REPLIES[kind](getattr(message, kind))


def _tensors(message: Any) -> None:
    check_tensors(message.tensors, message.payload_bytes)


_OF_REQUESTS: dict[str, Callable[[Any], None]] = {"open": _open, "step": _step, "route": _route}
_OF_REPLIES: dict[str, Callable[[Any], None]] = {
    "opened": _opened,
    "result": _result,
    "failure": _failure,
    "notice": _notice,
}

KINDS: tuple[tuple[Any, Callable[[Any], None]], ...] = (
    (pb.InferRequest, _request),
    (pb.InferReply, _reply),
    (pb.Tensor, _tensor),
    (pb.CacheOp, _op),
    (pb.HopTrace, _trace),
    (pb.ProgressReply, _progress),
    (pb.Step, _tensors),
    (pb.Failure, _failure),
    (pb.Open, _open),
)


def run(data: bytes) -> None:
    """One message: its kind by the first byte."""
    if not data:
        return
    message_class, read = KINDS[data[0] % len(KINDS)]
    try:
        message = message_class.FromString(data[1:])
    except DecodeError:
        return
    try:
        read(message)
    except WireError:
        return


def seeds() -> list[bytes]:
    """One right message of each kind."""
    refused = Failure(PeerFull("no room", retry_after_s=2.0, peer_id="Qm"), 3)
    requests = [
        Open(SESSION, 1, "f" * 32, Span(0, 4), "int8", 1, 16, edge=EDGE).to_proto(),
        Route(1, 2, "Qm" + "a" * 44, EDGE).to_proto(),
        pb.InferRequest(step=STEP.header(), chunk=STEP.payload),
    ]
    replies = [
        Opened(1, 2, 3, "float32").to_proto(),
        Notice("draining", 1.0).to_proto(),
        refused.to_proto(),
        pb.InferReply(result=StepResult(STEP, "it is lost").header()),
    ]
    other = [
        (2, TENSOR.to_proto()),
        (3, pb.CacheOp(kind="reorder", values=[1, 0])),
        (4, TRACE.to_proto()),
        (5, Progress(1, 2, 3, 4, 5, 6, 7.0).to_proto()),
        (6, STEP.header()),
        (7, refused.to_proto().failure),
        (8, requests[0].open),
    ]
    made = [(0, message) for message in requests] + [(1, message) for message in replies] + other
    return [bytes((kind,)) + message.SerializeToString() for kind, message in made]


TARGET = Target("messages", run, seeds, modules=("protocol.messages",), nbytes=8 << 20)
