"""What the other side says is cut to what can be shown, kept and calculated with."""

from __future__ import annotations

import math

import pytest

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, PeerFull, PeerLost
from protocol.frames import ReplyAssembler, RequestAssembler, held_bytes
from protocol.limits import HEADER_BYTES, MAX_ERROR_CHARS, MAX_NAME_CHARS, MAX_PEER_ID_CHARS, MAX_RETRY_S
from protocol.messages import Failure, HopTrace, Notice, Opened, StepResult

EMPTY = pb.InferRequest(step=pb.Step(epoch=1, ops=[pb.CacheOp(kind="reorder", values=[1] * 1000)]))


def test_texts_cannot_drive_a_terminal() -> None:
    said = "gone\x1b[2J\r\nError: \u202etxt.exe"
    failure = Failure.from_proto(pb.Failure(code="peer-lost", message=said, peer_id="Qm\x07" + "a" * 500))
    assert isinstance(failure.error, PeerLost)
    assert failure.error.message == "gone [2J  Error:  txt.exe"
    assert failure.error.peer_id == "Qm " + "a" * (MAX_PEER_ID_CHARS - 3)
    assert StepResult.from_proto(pb.StepResult(undelivered="\x1b]0;x\x07" + "y" * 9999), b"").undelivered.isprintable()
    assert len(Failure.from_proto(pb.Failure(message="é" * 9999)).error.message) == MAX_ERROR_CHARS


@pytest.mark.parametrize(
    ("said", "heard"),
    [(2.0, 2.0), (0.0, None), (-1.0, None), (math.nan, None), (math.inf, MAX_RETRY_S), (1e30, MAX_RETRY_S)],
)
def test_nobody_is_sent_away_for_ever(said: float, heard: float | None) -> None:
    error = Failure.from_proto(pb.Failure(code="peer-full", retry_after_s=said)).error
    assert isinstance(error, PeerFull) and error.retry_after_s == heard


@pytest.mark.parametrize("said", [math.nan, math.inf, -1.0, 1e30])
def test_times_are_times(said: float) -> None:
    assert Notice.from_proto(pb.Notice(state="x" * 500, expected_ms=said)) == Notice("x" * MAX_NAME_CHARS, 0.0)
    with pytest.raises(BadMessage):
        HopTrace.from_proto(pb.HopTrace(queue_ms=said))
    with pytest.raises(BadMessage):
        HopTrace.from_proto(pb.HopTrace(compute_ms=said))


def test_a_dtype_is_a_name() -> None:
    with pytest.raises(BadMessage):
        Opened.from_proto(pb.Opened(dtype="x" * 100))


def test_the_header_of_a_step_has_a_size() -> None:
    large = pb.Step(tensors=[pb.Tensor(name="x" * 64, codec="y" * 64, dtype="z" * 64)] * 300)
    assert large.ByteSize() > HEADER_BYTES
    with pytest.raises(BadMessage, match="header"):
        RequestAssembler(1 << 20).feed(pb.InferRequest(step=large))
    with pytest.raises(BadMessage, match="header"):
        ReplyAssembler(1 << 20).feed(pb.InferReply(result=pb.StepResult(step=large)))


def test_a_step_without_payload_takes_memory_too() -> None:
    asked: list[int] = []
    RequestAssembler(1 << 20, asked.append).feed(EMPTY)
    assert asked == [held_bytes(EMPTY.step)]
    assert asked[0] >= 8 * 1000, "a list of numbers takes eight bytes for each"
