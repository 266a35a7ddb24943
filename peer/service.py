"""The gRPC surface of a peer. Turns messages into sessions and steps, errors into typed failures; computes nothing.

Life of a step here: `Infer` -> `RequestAssembler.feed` -> `ComputeThread.run(Worker.execute)` -> `result_frames`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from peer.budget import MessageBudget
from peer.compute import ComputeThread
from peer.session import Session, SessionTable
from peer.worker import Worker
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import BadMessage, PeerFault, PotluckError, WireError
from protocol.frames import RequestAssembler, result_frames
from protocol.limits import PAYLOAD_BYTES
from protocol.messages import Close, Failure, Open, Opened, Step, StepResult, check_version

logger = logging.getLogger(__name__)

PING_BYTES = 64 << 10


class UnreadableAsEmpty(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Bytes that are no message reach the service as an empty one, to be refused; grpc would log a traceback."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return handler and handler._replace(request_deserializer=_or_empty(handler.request_deserializer))


def _or_empty(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return parse(b"")

    return parsed


class PeerService(pb_grpc.PeerServicer):
    """Serves one span.

    Args:
        describe: makes the current Description.
        messages: bytes of all steps that arrive, wait or run.
        max_payload_bytes: a larger step is refused by its header.
    """

    def __init__(
        self,
        describe: Callable[[], pb.Description],
        sessions: SessionTable,
        worker: Worker,
        compute: ComputeThread,
        messages: MessageBudget,
        max_payload_bytes: int,
    ) -> None:
        self._describe = describe
        self._sessions = sessions
        self._worker = worker
        self._compute = compute
        self._messages = messages
        self._max_payload_bytes = max_payload_bytes

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:  # noqa: N802
        try:
            check_version(request.wire_version)
        except PotluckError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        return self._describe()

    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingReply:  # noqa: N802
        if len(request.payload) > PING_BYTES:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a ping carries {PING_BYTES} bytes at most")
        return pb.PingReply(
            payload=request.payload,
            kv_tokens_left=self._sessions.budget.tokens_left,
            sessions=len(self._sessions),
            queue=self._compute.queued,
        )

    async def Infer(self, requests: AsyncIterator[pb.InferRequest], context: Any) -> AsyncIterator[pb.InferReply]:  # noqa: N802
        held = _Held(self._messages)
        assembler = RequestAssembler(self._max_payload_bytes, held.reserve)
        session: Session | None = None
        try:
            async for message in requests:
                try:
                    request = assembler.feed(message)
                    if request is None:
                        continue
                    if isinstance(request, Close):
                        self._close(session)
                        session = None
                        return
                    if isinstance(request, Open):
                        session = self._open(session, request)
                        yield self._opened(session).to_proto()
                    else:
                        result = await self._step(session, request)
                        held.release()
                        for reply in result_frames(result):
                            yield reply
                except PotluckError as error:
                    # A step that was refused by its header goes on arriving: only a new stream is in order again.
                    fatal = isinstance(error, WireError) or assembler.refused
                    held.release()
                    yield Failure(error, step_id=_step_id(message), fatal=fatal).to_proto()
                    if fatal:
                        await _drop_payload(message, requests)
                        return
        finally:
            held.release()
            if session is not None:  # the stream ended without a Close: the client may come back
                self._sessions.detach(session, time.monotonic())

    def _open(self, session: Session | None, request: Open) -> Session:
        if session is not None:
            raise BadMessage("a stream carries one session")
        return self._sessions.open(request, time.monotonic())

    def _close(self, session: Session | None) -> None:
        if session is not None:
            self._sessions.close(session)

    def _opened(self, session: Session) -> Opened:
        return Opened(
            session.next_step,
            session.tokens,
            self._sessions.budget.tokens_left,
            self._describe().dtype,
        )

    async def _step(self, session: Session | None, step: Step) -> StepResult:
        if session is None:
            raise BadMessage("a step before the session was opened")
        session.last_used_s = time.monotonic()
        try:
            result = await self._compute.run(self._worker.execute, session, step, time.perf_counter())
        except PotluckError:
            raise
        except Exception as error:
            logger.exception("a step failed before it was applied")
            raise PeerFault(f"the step failed on this peer: {type(error).__name__}") from error
        session.last_used_s = time.monotonic()
        return result


async def _drop_payload(message: pb.InferRequest, requests: AsyncIterator[pb.InferRequest]) -> None:
    """Reads what still comes of a refused step, without keeping it: a stream that ends under a client's writes would
    hide the refusal from it."""
    if message.WhichOneof("kind") != "step":
        return
    missing = min(message.step.payload_bytes, PAYLOAD_BYTES) - len(message.chunk)
    while missing > 0:
        more = await anext(requests, None)
        if more is None or not more.chunk:
            return
        missing -= len(more.chunk)


class _Held:
    """What one stream holds of the message budget."""

    def __init__(self, budget: MessageBudget) -> None:
        self._budget = budget
        self._nbytes = 0

    def reserve(self, nbytes: int) -> None:
        self._budget.reserve(nbytes)
        self._nbytes += nbytes

    def release(self) -> None:
        self._budget.release(self._nbytes)
        self._nbytes = 0


def _step_id(message: pb.InferRequest) -> int:
    return int(message.step.step_id) if message.WhichOneof("kind") == "step" else 0
