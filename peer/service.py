"""The gRPC surface of a peer. Turns messages into sessions and steps, errors into typed failures; computes nothing.

Life of a step here: `Infer` (from the client, a `Visit`) or `Push` (from the peer before, `Pushes`) -> `Arrival.feed`
-> `Intake.take` -> `Session.deliveries`, which the session's `Pump` empties.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from peer.accounts import home_of
from peer.house import House
from peer.pushes import Pushes
from peer.reach.dialback import DialBacks
from peer.replies import ClientLeft, ReplyStream
from peer.session import Session
from peer.visit import Visit
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import PeerFull, PotluckError, SessionLost, WireError
from protocol.frames import result_frames
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import Notice, Progress, StepResult, check_version

logger = logging.getLogger(__name__)

PING_BYTES = 64 << 10


class PeerService(pb_grpc.PeerServicer):
    """Serves one span.

    Args:
        house: what all streams share.
        describe: makes the current Description.

    Attributes:
        dial_backs: tells others whether they can be reached.
        whence: from where a connection really comes, as grpc names both: it may be carried here by this very machine.
    """

    def __init__(self, house: House, describe: Callable[[], pb.Description]) -> None:
        self.dial_backs = DialBacks()
        self.whence: Callable[[str], str] = lambda connection: connection
        self._house = house
        self._describe = describe
        self._visits: set[Visit] = set()

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
            kv_tokens_left=self._house.sessions.tokens_left,
            sessions=len(self._house.sessions),
            queue=self._house.engine.queued,
            steps_begun=self._house.intake.begun,
            steps_pushed=self._house.intake.pushed,
            steps_relayed=self._house.intake.relayed,
        )

    async def Progress(self, request: pb.ProgressRequest, context: Any) -> pb.ProgressReply:  # noqa: N802
        session = await self._held(request.session_id, context)
        return Progress(
            epoch=session.epoch,
            received=session.received,
            next_step=session.next_step,
            sent=session.sent,
            arriving_bytes=session.arriving_bytes,
            queue=self._house.engine.queued,
            expected_ms=self._house.engine.expected_ms,
        ).to_proto()

    async def Recall(self, request: pb.RecallRequest, context: Any) -> None:  # noqa: N802
        session = await self._held(request.session_id, context)
        client = ReplyStream(context, self._house.tally)
        try:
            # The outputs belong to the compute thread.
            kept = await self._house.compute.run(session.outputs.recall, request.first_step)
            if (receipt := await self._house.receipts.rest(session)) is not None:
                await client.send(receipt.to_proto())
            for entry in kept:
                await client.send(*result_frames(StepResult(entry.step(session.epoch))))
        except SessionLost as error:
            await client.fail(error)
        except ClientLeft:
            logger.debug("a client left while it was told what is kept")

    async def _held(self, session_id: bytes, context: Any) -> Session:
        """The session, if this peer holds it; where it does not, the call ends."""
        session = self._house.sessions.find(session_id) if len(session_id) == SESSION_ID_BYTES else None
        if session is None or session.broken:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this peer does not hold that session")
        assert session is not None
        return session

    async def DialBack(self, request: pb.DialBackRequest, context: Any) -> pb.DialBackReply:  # noqa: N802
        try:
            return await self.dial_backs.answer(request, context.peer())
        except PotluckError as error:
            code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, WireError) else grpc.StatusCode.UNAVAILABLE
            await context.abort(code, error.message)
            raise

    async def Infer(self, requests: AsyncIterator[pb.InferRequest], context: Any) -> None:  # noqa: N802
        async with self._counted(context):
            visit = Visit(self._house, ReplyStream(context, self._house.tally), self.whence(context.peer()))
            self._visits.add(visit)
            try:
                await visit.run(requests)
            finally:
                self._visits.discard(visit)

    async def Push(self, requests: AsyncIterator[pb.PushRequest], context: Any) -> None:  # noqa: N802
        async with self._counted(context):
            await Pushes(self._house, context).run(requests)

    @contextlib.asynccontextmanager
    async def _counted(self, context: Any) -> AsyncIterator[None]:
        """A stream, as one of those from its address; refused if there are too many."""
        home, accounts = home_of(self.whence(context.peer())), self._house.gate.accounts
        try:
            accounts.enter(home)
        except PeerFull as full:
            self._house.tally.refusals[full.code] += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full.message)
        try:
            yield
        finally:
            accounts.leave(home)

    def refused(self, edge: bytes, error: PotluckError, step_id: int) -> None:
        """The next peer did not take a step: the client is asked to carry it there, and hears what is wrong."""
        for session in self._house.sessions:
            route = session.route
            if route is not None and route.peer_id and route.edge == edge and not session.undelivered:
                held = session.outputs.holds(step_id)
                session.fall_back(error.message, sent=step_id if held else route.next_step)

    def drain(self) -> None:
        """Tells all clients that this peer is leaving: they find replacements while it still answers."""
        for visit in self._visits:
            visit.tell(Notice("draining"))
