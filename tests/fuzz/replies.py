"""What a hostile peer sends to a client: through the hop's stream, the session's checks, decoding, and the trace.

Allowed: errors of the tree, of which the hop blames its own peer; never the one that says that a reply could not be
read, since that is a mistake of ours that was caught late. What is taken over is finite, and can be shown.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
import torch
from google.protobuf.message import DecodeError

from client.blame import Blame
from client.chain import Link
from client.config import ClientConfig
from client.encoding import decoded as decoded_of
from client.hop import Hop
from client.inbox import Inbox
from client.inquest import judge, signs_of_life
from client.loss import ChainBroken
from client.recorder import Recorder
from client.recovery import to_renew
from client.session import Session
from client.spec import SessionSpec
from client.stats import SessionStats
from client.times import Stopwatch
from dht.record import PeerRecord
from protocol import potluck_pb2 as pb
from protocol.errors import PeerFault, PeerLost, PotluckError
from protocol.journal import Entry, Part
from protocol.messages import HIDDEN, Failure, HopTrace, Notice, Open, Opened, Progress, Step, StepResult, TensorSpec
from protocol.span import Span
from tensor_codecs import codec
from tests.fuzz.messages import STEP
from tests.fuzz.source import Source, as_pieces
from tests.fuzz.target import Target
from tests.harness import KnownPeers

PEER = PeerRecord("QmPeer", "f", 4, Span(0, 4), "online", ("127.0.0.1:1",), b"", codecs=("none", "int8"))
LINK = Link(PEER, PEER.span)
OPENING = Open(b"s" * 16, 1, "f", PEER.span, "int8", 1, 16)
WAIT_S = 5.0  # never waited: what the peer says is all there
STATUS = b"!"
CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
SENT = torch.zeros(1, 2, 64)


class _Call:
    """A gRPC call whose other side has said everything already."""

    def __init__(self, replies: Sequence[Any]) -> None:
        self._replies = iter(replies)

    async def read(self) -> Any:
        reply = next(self._replies, grpc.aio.EOF)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def write(self, message: Any) -> None:
        """Nobody listens."""

    def cancel(self) -> None:
        """It has ended."""


class _Channel:
    """A channel to a peer that says `replies` on its stream, and `progress` when asked."""

    def __init__(self, replies: Sequence[Any], progress: Any) -> None:
        self._replies = replies
        self._progress = progress

    def stream_stream(self, *args: Any, **kwargs: Any) -> Callable[[], _Call]:
        return lambda: _Call(self._replies)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., _Call]:
        return lambda request, timeout: _Call(self._replies)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(request: Any, timeout: float) -> Any:
            return self._progress

        return call


_loop = asyncio.new_event_loop()


def run(data: bytes) -> None:
    """One stream of replies, each after its length; the first piece is what the peer says of its progress."""
    pieces = Source(data).pieces()
    first = next(pieces, b"")
    _loop.run_until_complete(_scene(list(_parsed(pieces)), _parse(pb.ProgressReply, first)))


def _parse(message_class: Any, data: bytes) -> Any:
    try:
        return message_class.FromString(data)
    except DecodeError:
        return None  # grpc.aio's word for it


def _parsed(pieces: Iterator[bytes]) -> Iterator[Any]:
    for piece in pieces:
        if piece[:1] == STATUS:  # no message begins so
            code = CODES[piece[1] % len(CODES)] if len(piece) > 1 else grpc.StatusCode.UNKNOWN
            details = piece[2:].decode(errors="replace")
            yield grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
        else:
            yield _parse(pb.InferReply, piece)


async def _scene(replies: Sequence[Any], progress: Any) -> None:
    inbox = Inbox()
    hop = Hop(LINK, _Channel(replies, progress), b"secret", inbox)  # type: ignore[arg-type]  # what it uses of one
    states = []
    try:
        states.append(await hop.attach(OPENING, WAIT_S, WAIT_S))
    except PotluckError as error:
        _check_error(error)
    if hop._stream is not None:
        await hop._stream.reading
    _check_progress(await hop.progress(WAIT_S))
    try:
        await hop.recall(0)
    except PotluckError as error:
        _check_error(error)
    for state in states:
        to_renew([state, Opened(3, 3, 0, "")], 2)
    while not inbox.empty():
        _check_heard(inbox.get_nowait().what, hop)
    hop.abandon()


def _check_error(error: PotluckError) -> None:
    assert not (isinstance(error, PeerFault) and "cannot be read" in error.message), error
    assert error.peer_id
    assert error.message.isprintable()


def _check_progress(report: Progress | PotluckError) -> None:
    if isinstance(report, Progress):
        verdict = judge([report, Progress(1, 2, 2, 2)], 1)  # type: ignore[list-item,unused-ignore]
        assert math.isfinite(verdict.expected_s)
        signs_of_life([report], judge([report], 1))


def _check_heard(what: StepResult | Notice | PotluckError, hop: Hop) -> None:
    if isinstance(what, PotluckError):
        _check_error(what)
        return
    if isinstance(what, Notice):
        assert len(what.state) < 100 and math.isfinite(what.expected_ms)
        return
    _check_trace(what.step.trace)
    assert what.undelivered.isprintable()
    for codec_name in ("int8", "none"):
        session = Session(SessionSpec("f", 4, codec_name), KnownPeers([PEER]), Blame(1.0), ClientConfig())
        session._chain.hops = [hop]
        try:
            session._check(what, _entry(), hop)
        except ChainBroken:
            continue
        try:
            decoded = decoded_of(what, SENT)
        except PotluckError:
            continue
        assert decoded.shape == SENT.shape and decoded.dtype == SENT.dtype


def _check_trace(trace: Sequence[HopTrace]) -> None:
    """What the peer says of its times is taken over into routes and reports."""
    recorder, stopwatch = Recorder(4, SessionStats()), Stopwatch()
    recorder.chain([LINK], [1.0, 1.0], [False])
    recorder.step([LINK], trace, 0.1, is_timed=True)
    json.dumps([recorder.trace().as_json(), recorder.trace().as_report()], allow_nan=False)
    for cost in trace:
        stopwatch.note("QmPeer", 4, 1, cost.compute_ms, cost.queue_ms, cost.kv_tokens_left)
    expected_ms = stopwatch.snapshot().expected_ms("QmPeer", 4, 1)
    assert expected_ms is None or expected_ms < 1e8


def _entry() -> Entry:
    spec = TensorSpec(HIDDEN, "none", "float32", tuple(SENT.shape), SENT.nbytes)
    return Entry(0, 2, 1, (Part(spec, bytes(SENT.nbytes)),))


def seeds() -> list[bytes]:
    """Right answers, whole and in pieces, and refusals."""
    logging.getLogger("client.stream").setLevel(logging.CRITICAL)  # what it would log of findings is raised here
    progress = Progress(1, 2, 3, 4).to_proto().SerializeToString()
    opened = Opened(0, 0, 100, "float32").to_proto()
    streams = [[opened]]
    for name in ("none", "int8"):
        payload = codec(name).encode(SENT)
        spec = TensorSpec(HIDDEN, name, "float32", tuple(SENT.shape), len(payload))
        result = StepResult(Step(1, 0, 0, (spec,), payload, trace=STEP.trace))
        whole = pb.InferReply(result=result.header(), chunk=payload)
        halves = [
            pb.InferReply(result=result.header(), chunk=payload[:50]),
            pb.InferReply(more=pb.More(), chunk=payload[50:]),
        ]
        streams += [[opened, whole], [opened, *halves, Notice("draining").to_proto()]]
    refusal = Failure(PeerLost("it is gone"), 3).to_proto()
    streams += [[refusal], [opened, refusal]]
    ended = as_pieces([progress, opened.SerializeToString(), STATUS + b"\3gone \x1b[2J"])
    return [ended, *(as_pieces([progress, *(message.SerializeToString() for message in stream)]) for stream in streams)]


TARGET = Target(
    "replies",
    run,
    seeds,
    modules=(
        "client.hop",
        "client.stream",
        "protocol.frames",
        "protocol.messages",
        "client.inquest",
        "client.recorder",
    ),
    short=800,
)
