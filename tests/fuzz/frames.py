"""Streams of messages to a peer, put together to requests, with what they hold of the peer's message budget.

Allowed: `WireError`, which ends the stream, and `PeerFull`. Whatever came, all of the budget is given back, and no
more is held than was announced.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from peer.budget import MessageBudget, MessageShare
from protocol import potluck_pb2 as pb
from protocol.errors import PotluckError, WireError
from protocol.frames import RequestAssembler, step_frames
from protocol.messages import Close, Open, Route, Step
from protocol.span import Span
from tests.fuzz.messages import EDGE, SESSION, STEP
from tests.fuzz.source import Source, as_pieces
from tests.fuzz.target import Target

BUDGET_BYTES = 1 << 16
PAYLOAD_BYTES = 1 << 15


def run(data: bytes) -> None:
    """One stream: each message after its length."""
    budget = MessageBudget(BUDGET_BYTES)
    share = MessageShare(budget)
    assembler = RequestAssembler(PAYLOAD_BYTES, share.reserve)
    arrived = 0
    try:
        for piece in Source(data).pieces():
            try:
                message = pb.InferRequest.FromString(piece)
            except DecodeError:
                message = pb.InferRequest()  # as peer/unreadable.py has it
            arrived += len(message.chunk)
            try:
                request = assembler.feed(message)
            except PotluckError as error:
                share.release()
                if isinstance(error, WireError) or assembler.refused:
                    return
                continue
            assert BUDGET_BYTES - budget.bytes_left <= PAYLOAD_BYTES
            match request:
                case Step():
                    assert len(request.payload) == sum(spec.nbytes for spec in request.tensors) <= arrived
                    budget.release(share.hand_over())
                case Close():
                    return
    finally:
        share.release()
        assert budget.bytes_left == BUDGET_BYTES


def seeds() -> list[bytes]:
    """Whole sessions, and steps in pieces."""
    opening = Open(SESSION, 1, "f" * 32, Span(0, 4), "int8", 1, 16, edge=EDGE).to_proto()
    frames = list(step_frames(STEP))
    pieces = [
        pb.InferRequest(step=STEP.header(), chunk=STEP.payload[:3]),
        pb.InferRequest(more=pb.More(), chunk=STEP.payload[3:5]),
        pb.InferRequest(more=pb.More(), chunk=STEP.payload[5:]),
    ]
    close = pb.InferRequest(close=pb.Close())
    streams = ([opening, Route(1, 0).to_proto(), *frames, close], [opening, *pieces, *frames], pieces[:2], [close])
    return [as_pieces([message.SerializeToString() for message in stream]) for stream in streams]


TARGET = Target("frames", run, seeds, modules=("protocol.frames", "protocol.messages", "peer.budget"), nbytes=8 << 20)
