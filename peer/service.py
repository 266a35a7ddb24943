"""The gRPC surface of a peer. Turns messages into sessions and steps, errors into typed failures; computes nothing.

Life of a step here: `Infer` (from the client) or `Push` (from the peer before) -> `RequestAssembler.feed` ->
`Session.deliveries`, which the session's `Pump` empties.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from peer.accounts import Account, home_of
from peer.budget import MessageShare
from peer.compute import ComputeThread
from peer.engine import Engine
from peer.gate import Gate
from peer.links import Links
from peer.pump import SEND_TIMEOUT_S, Pump, ReplyStream
from peer.reach.dialback import DialBacks
from peer.receipts import Receipts
from peer.session import ClientLeft, Delivery, Session, SessionTable
from peer.tally import Tally
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import (
    BadMessage,
    NotAdmitted,
    PeerFull,
    PeerLost,
    PotluckError,
    SessionLost,
    StaleEpoch,
    WireError,
)
from protocol.frames import RequestAssembler, held_bytes, result_frames
from protocol.limits import PAYLOAD_BYTES, SESSION_ID_BYTES
from protocol.messages import (
    HIDDEN,
    Close,
    Failure,
    Notice,
    Open,
    Opened,
    Progress,
    Route,
    Step,
    StepResult,
    check_version,
)

logger = logging.getLogger(__name__)

PING_BYTES = 64 << 10
HELD_UP_S = 10.0  # for so long a step waits for those of its session that are before it
OPEN_S = 10.0  # from a stream's beginning, or its last refusal, until it opens a session
STALL_S = 20.0  # between two messages of one step; a chunk of 128 KiB takes less on the slowest line
SLOWEST_BYTES_S = 8 << 10  # a step that comes more slowly, after STALL_S, does not come
PUSH_DEBT_S = 5.0  # pushes are refused that came so much faster than their client's rate
DROP_S = 30.0  # for the rest of a step that was refused
PUSH_IDLE_S = 600.0  # a stream of pushes without any; its other side ends it after half of that
MOST_REFUSED = 256  # pushes in a row of which none is taken: whoever sends them has no session here


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
        gate: says who may open sessions.
        describe: makes the current Description.
        max_payload_bytes: a larger step is refused by its header.
        tally: counts what comes, goes and is refused.
        receipts: signs what was computed.

    Attributes:
        links: to the peers after this one; set before the port opens.
        dial_backs: tells others whether they can be reached.
        begun, pushed, relayed: steps so far that came from clients at the model's first block, from the peer before
            this one, and from clients that had to carry them from there.
    """

    def __init__(
        self,
        gate: Gate,
        describe: Callable[[], pb.Description],
        sessions: SessionTable,
        engine: Engine,
        compute: ComputeThread,
        max_payload_bytes: int,
        tally: Tally,
        receipts: Receipts,
    ) -> None:
        self.receipts = receipts
        self.links: Links | None = None
        self.dial_backs = DialBacks()
        self.begun = self.pushed = self.relayed = 0
        self.gate = gate
        self._describe = describe
        self._sessions = sessions
        self._engine = engine
        self._compute = compute
        self._max_payload_bytes = max_payload_bytes
        self._tally = tally
        self._visits: set[_Visit] = set()

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
            kv_tokens_left=self._sessions.tokens_left,
            sessions=len(self._sessions),
            queue=self._engine.queued,
            steps_begun=self.begun,
            steps_pushed=self.pushed,
            steps_relayed=self.relayed,
        )

    async def Progress(self, request: pb.ProgressRequest, context: Any) -> pb.ProgressReply:  # noqa: N802
        session = self._sessions.find(request.session_id) if len(request.session_id) == SESSION_ID_BYTES else None
        if session is None or session.broken:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this peer does not hold that session")
        assert session is not None
        return Progress(
            epoch=session.epoch,
            received=session.received,
            next_step=session.next_step,
            sent=session.sent,
            arriving_bytes=session.arriving_bytes,
            queue=self._engine.queued,
            expected_ms=self._engine.expected_ms,
        ).to_proto()

    async def Recall(self, request: pb.RecallRequest, context: Any) -> None:  # noqa: N802
        session = self._sessions.find(request.session_id) if len(request.session_id) == SESSION_ID_BYTES else None
        if session is None or session.broken:
            await context.abort(grpc.StatusCode.NOT_FOUND, "this peer does not hold that session")
        assert session is not None
        client = ReplyStream(context, self._tally)
        try:
            kept = await self._compute.run(session.outputs.recall, request.first_step)  # they belong to that thread
            if (receipt := await self.receipts.rest(session)) is not None:
                await client.send(receipt.to_proto())
            for entry in kept:
                await client.send(*result_frames(StepResult(entry.step(session.epoch))))
        except SessionLost as error:
            await client.fail(error)
        except ClientLeft:
            logger.debug("a client left while it was told what is kept")

    async def DialBack(self, request: pb.DialBackRequest, context: Any) -> pb.DialBackReply:  # noqa: N802
        try:
            return await self.dial_backs.answer(request, context.peer())
        except PotluckError as error:
            code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, WireError) else grpc.StatusCode.UNAVAILABLE
            await context.abort(code, error.message)
            raise

    async def Infer(self, requests: AsyncIterator[pb.InferRequest], context: Any) -> None:  # noqa: N802
        async with self._counted(context):
            visit = _Visit(self, ReplyStream(context, self._tally), context.peer())
            self._visits.add(visit)
            try:
                await visit.run(requests)
            finally:
                self._visits.discard(visit)

    @contextlib.asynccontextmanager
    async def _counted(self, context: Any) -> AsyncIterator[None]:
        """A stream, as one of those from its address; refused if there are too many."""
        home = home_of(context.peer())
        try:
            self.gate.accounts.enter(home)
        except PeerFull as full:
            self._tally.refusals[full.code] += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, full.message)
        try:
            yield
        finally:
            self.gate.accounts.leave(home)

    async def Push(self, requests: AsyncIterator[pb.PushRequest], context: Any) -> None:  # noqa: N802
        arriving: dict[bytes, _Arriving] = {}
        async with self._counted(context):
            try:
                await self._take_all(arriving, requests, context)
            finally:
                for half in arriving.values():
                    half.release()

    async def _take_all(
        self, arriving: dict[bytes, _Arriving], requests: AsyncIterator[pb.PushRequest], context: Any
    ) -> None:
        """All pushes of one stream, until it ends, or is of no use."""
        step_ids: dict[bytes, int] = {}  # of what arrives
        refused = 0  # in a row
        while (message := await self._next_push(arriving, requests)) is not None:
            if message.request.WhichOneof("kind") == "step":
                step_ids[message.edge] = message.request.step.step_id
                await self.make_way(self._sessions.at_edge(message.edge), message.request)
            try:
                if self._take(arriving, message):
                    refused = 0
            except PotluckError as error:
                self._tally.refusals[error.code] += 1
                refusal = Failure(error, step_ids.get(message.edge, 0)).to_proto().failure
                refused += 1
                reply = pb.PushReply(edge=message.edge, failure=refusal)
                if not await _told(context, reply) or refused >= MOST_REFUSED:
                    return
            if message.edge not in arriving:
                step_ids.pop(message.edge, None)

    async def _next_push(
        self, arriving: dict[bytes, _Arriving], requests: AsyncIterator[pb.PushRequest]
    ) -> pb.PushRequest | None:
        """None: the stream has ended, or nothing comes any more."""
        now_s = time.monotonic()
        left_s = min(
            (left for half in arriving.values() if (left := half.patience_s(now_s)) is not None), default=PUSH_IDLE_S
        )
        try:
            async with asyncio.timeout(left_s):
                return await anext(requests, None)
        except TimeoutError:
            logger.info("a peer that pushed has fallen silent; its stream is ended")
            return None

    def _take(self, arriving: dict[bytes, _Arriving], message: pb.PushRequest) -> bool:
        """One message of a push; `arriving`: the steps that are not whole yet, by edge. Is it of any session?

        Raises:
            StaleEpoch: nobody takes steps under that token.
            PeerFull, WireError: the step is refused.
        """
        kind = message.request.WhichOneof("kind")
        if kind not in ("step", "more"):
            raise BadMessage("only steps can be pushed")
        half = arriving.get(message.edge)
        if half is None:
            if kind == "more":
                return False  # of a step that was refused
            session = self._sessions.by_edge(message.edge)
            half = arriving[message.edge] = self.arriving()
            half.session = session
        try:
            self._charge(half.session, message)
            step = half.feed(message.request)
            if not isinstance(step, Step):
                return True
            session = self._sessions.by_edge(message.edge)
            if step.epoch != session.epoch:
                raise StaleEpoch(f"the session is at epoch {session.epoch}, not {step.epoch}")
        except PotluckError:
            half.release()
            del arriving[message.edge]
            raise
        del arriving[message.edge]
        self.pushed += 1
        self.enqueue(session, half.hand_over(step, pushed=True))
        return True

    def _charge(self, session: Session | None, message: pb.PushRequest) -> None:
        """A stream of pushes carries steps of many clients, so that it is not read more slowly for one of them.

        Raises:
            PeerFull: that one has sent far more than its rate.
        """
        account = None if session is None else session.account
        pause_s = self.gate.accounts.pause_s(account, len(message.request.chunk), time.monotonic())
        if pause_s > PUSH_DEBT_S and message.request.WhichOneof("kind") == "step":
            raise PeerFull("more is pushed for this client than it may send", retry_after_s=pause_s)

    async def make_way(self, session: Session | None, message: pb.InferRequest) -> None:
        """Returns when there is room for the step that `message` begins, or none of its session is waiting: a pipeline
        that fills the message budget itself is held up; where others fill it, it is refused at once."""
        nbytes, messages = held_bytes(message.step), self._sessions.messages
        if session is None or nbytes <= messages.bytes_left:
            return
        with contextlib.suppress(TimeoutError):  # then it is refused
            async with asyncio.timeout(HELD_UP_S):
                while nbytes > messages.bytes_left and session.received > session.next_step:
                    await messages.freed()

    async def slow_down(self, session: Session | None, nbytes: int) -> None:
        """`nbytes` have come from a client: whoever sends more than its rate is read later, and so has to wait."""
        account = None if session is None else session.account
        if pause_s := self.gate.accounts.pause_s(account, nbytes, time.monotonic()):
            await asyncio.sleep(pause_s)

    def arriving(self) -> _Arriving:
        return _Arriving(self._sessions, self._max_payload_bytes)

    def enqueue(self, session: Session, delivery: Delivery) -> None:
        """A step has arrived whole; what it holds of the message budget is its own until it is computed."""
        if session.broken:  # dropped while the step arrived: nobody would compute it, or give the bytes back
            delivery.release(self._sessions.messages)
            raise SessionLost("this peer does not hold that session any more; replay it")
        session.received = max(session.received, delivery.step.step_id + 1)
        session.last_used_s = time.monotonic()
        session.deliveries.put_nowait(delivery)

    def refused(self, edge: bytes, error: PotluckError, step_id: int) -> None:
        """The next peer did not take a step: the client is asked to carry it there, and hears what is wrong."""
        for session in self._sessions:
            route = session.route
            if route is not None and route.peer_id and route.edge == edge and not session.undelivered:
                held = session.outputs.holds(step_id)
                session.fall_back(error.message, sent=step_id if held else route.next_step)

    def drain(self) -> None:
        """Tells all clients that this peer is leaving: they find replacements while it still answers."""
        for visit in self._visits:
            visit.tell(Notice("draining"))

    def pump(self, session: Session, client: ReplyStream) -> Pump:
        assert self.links is not None
        return Pump(
            session, self._sessions, self._engine, self._compute, self.links, client, self._tally, self.receipts
        )

    @property
    def sessions(self) -> SessionTable:
        return self._sessions

    def opened(self, session: Session) -> Opened:
        return Opened(
            session.next_step,
            session.tokens,
            self._sessions.tokens_left,
            self._describe().dtype,
            kept_from=session.outputs.kept_from,
        )


class _Visit:
    """One client's `Infer` stream, from its Open to its end."""

    def __init__(self, service: PeerService, client: ReplyStream, connection: str) -> None:
        self.client = client
        self._connection = connection  # as which the client counts where clients share
        self._service = service
        self._session: Session | None = None
        self._pumping: asyncio.Task[None] | None = None

    async def run(self, requests: AsyncIterator[pb.InferRequest]) -> None:
        """Until the client closes the session or leaves, or one side broke the protocol."""
        arriving = self._service.arriving()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._reading = tasks.create_task(self._read(requests, arriving))
                await asyncio.wait({self._reading})
                if self._pumping is not None:
                    self._pumping.cancel()
        except* ClientLeft:
            logger.debug("a client left while it was answered")
        finally:
            arriving.end()
            session, self._session = self._session, None
            if session is not None:  # the stream ended without a Close: the client may come back
                self._service.sessions.detach(session, time.monotonic())
                self._let_go(session)
            # Tasks that were cancelled know this visit, in cycles: these are not to keep what was under way.
            del session, self._tasks, self._reading, self._pumping

    async def _read(self, requests: AsyncIterator[pb.InferRequest], arriving: _Arriving) -> None:
        while (message := await self._next(requests, arriving)) is not None:
            try:
                arriving.session = self._session
                await self._service.slow_down(self._session, len(message.chunk))
                await self._service.make_way(self._session, message)
                request = arriving.feed(message)
                if isinstance(request, Close):
                    await self._close()
                    return
                if isinstance(request, Open):
                    await self._open(request)
                elif isinstance(request, Route):
                    self._opened_session().reroute(request)
                elif isinstance(request, Step):
                    self._enqueue(request, arriving)
            except PotluckError as error:
                # A step that was refused by its header goes on arriving: only a new stream is in order again.
                fatal = isinstance(error, WireError | NotAdmitted) or arriving.refused
                arriving.release()
                await self.client.fail(error, _step_id(message), fatal=fatal)
                if fatal:
                    await _drop_payload(message, requests)
                    return

    async def _next(self, requests: AsyncIterator[pb.InferRequest], arriving: _Arriving) -> pb.InferRequest | None:
        """None: the stream has ended, or what has begun on it does not go on."""
        left_s = arriving.patience_s(time.monotonic())
        if left_s is None and self._session is None:
            left_s = OPEN_S
        try:
            async with asyncio.timeout(left_s):
                return await anext(requests, None)
        except TimeoutError:
            arriving.release()
            what = "the rest of a step" if self._session is not None else "an opening"
            await self.client.fail(PeerLost(f"{what} did not come in time"), fatal=True)
            return None

    async def _open(self, request: Open) -> None:
        mine = self._session
        if mine is not None and (request.session_id != mine.session_id or not request.resume):
            raise BadMessage("a stream carries one session")
        now_s = time.monotonic()
        try:
            account = self._service.gate.admit(request, self._connection, now_s, time.time())
            session = self._session = self._service.sessions.open(request, now_s, account)
        except PotluckError:
            await asyncio.sleep(self._service.gate.accounts.refused(home_of(self._connection), now_s))
            raise
        if mine is not None:
            session.attached -= 1  # the same stream, a new epoch
        else:
            session.owner, before = self, session.owner
            if before is not None:
                await before.leave()
        if session.running is not None and not session.running.done():
            # From here on, `next_step` is what it is: steps of older epochs that still wait are refused.
            await asyncio.wait({session.running})
        session.received = session.next_step
        await self.client.send(self._service.opened(session).to_proto())
        if self._pumping is None:
            self._pumping = self._tasks.create_task(self._pump(session))

    def tell(self, notice: Notice) -> None:
        """The client hears it soon."""
        if not self._reading.done():
            self._tasks.create_task(self.client.send(notice.to_proto()))

    async def leave(self) -> None:
        """The client has come back on another stream; this one's session is its own no longer."""
        if self._session is not None:
            self._session.attached -= 1
            self._session = None
        self._reading.cancel()
        if self._pumping is not None:
            self._pumping.cancel()
            await asyncio.wait({self._pumping})

    def end(self) -> None:
        """The session was dropped: the client hears that by the stream's end."""
        self._reading.cancel()

    async def _pump(self, session: Session) -> None:
        await self._service.pump(session, self.client).run()
        self._reading.cancel()

    def _enqueue(self, step: Step, arriving: _Arriving) -> None:
        session = self._opened_session()
        if session.span.start == 0:
            self._service.begun += 1
        else:
            self._service.relayed += 1
        self._service.enqueue(session, arriving.hand_over(step, pushed=False))

    def _opened_session(self) -> Session:
        if self._session is None:
            raise BadMessage("a step or a route before the session was opened")
        return self._session

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._service.sessions.close(session)
            self._let_go(session)
            if (receipt := await self._service.receipts.rest(session)) is not None:
                await self.client.send(receipt.to_proto())

    def _let_go(self, session: Session) -> None:
        if session.owner is self:
            session.owner = None


class _Arriving:
    """What arrives on one stream and is not whole yet, and what that holds of the message budget and an account."""

    def __init__(self, sessions: SessionTable, max_payload_bytes: int) -> None:
        self.session: Session | None = None
        self._sessions = sessions
        self._held = MessageShare(sessions.messages)
        self._account: Account | None = None  # that holds the two
        self._nbytes = self._tokens = self._announced = 0
        self._due_s: float | None = None  # of a step that is not whole
        self._assembler = RequestAssembler(max_payload_bytes, self._admit)

    def feed(self, message: pb.InferRequest) -> Open | Route | Step | Close | None:
        """See `RequestAssembler.feed`."""
        if self.session is not None:
            self.session.arriving_bytes += len(message.chunk)
        if message.WhichOneof("kind") == "step":
            self._announced = _tokens(message.step)  # the header itself would keep the message's chunk
        request = self._assembler.feed(message)
        if request is not None:
            self._due_s = None
        return request

    def _admit(self, nbytes: int) -> None:
        self._held.reserve(nbytes)
        account = None if self.session is None else self.session.account
        if account is not None:
            try:
                account.hold(nbytes, self._announced, self._sessions.most_bytes(account))
            except PeerFull:
                self._held.release()
                raise
            self._account, self._nbytes, self._tokens = account, nbytes, self._announced
        self._due_s = time.monotonic() + STALL_S + nbytes / SLOWEST_BYTES_S

    @property
    def refused(self) -> bool:
        """Was the last step refused by its header, while the rest of it may still arrive?"""
        return self._assembler.refused

    def patience_s(self, now_s: float) -> float | None:
        """Seconds until more has to be there; None: no step has begun."""
        return None if self._due_s is None else max(0.0, min(STALL_S, self._due_s - now_s))

    def hand_over(self, step: Step, *, pushed: bool) -> Delivery:
        """The step that is whole, with what was held for it."""
        account, tokens, self._account = self._account, self._tokens, None
        return Delivery(step, time.perf_counter(), self._held.hand_over(), pushed, account, tokens if account else 0)

    def release(self) -> None:
        self._held.release()
        self._due_s = None
        if self._account is not None:
            self._account.release(self._nbytes, self._tokens)
            self._account = None

    def end(self) -> None:
        """Nothing more will arrive: gives back what is held, and forgets what there is."""
        self.release()
        self.session = None
        del self._assembler


def _tokens(header: pb.Step) -> int:
    """Rows x tokens of a step, as its header says."""
    hidden = [tensor for tensor in header.tensors if tensor.name == HIDDEN and len(tensor.shape) >= 3]
    return sum(tensor.shape[-3] * (tensor.keep or tensor.shape[-2]) for tensor in hidden)


async def _told(context: Any, reply: pb.PushReply) -> bool:
    """Has the other side taken that answer?"""
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await context.write(reply)
    except TimeoutError:
        logger.info("a peer that pushes does not read what it is told; its stream is ended")
        return False
    return True


async def _drop_payload(message: pb.InferRequest, requests: AsyncIterator[pb.InferRequest]) -> None:
    """Reads what still comes of a refused step, without keeping it: a stream that ends under a client's writes would
    hide the refusal from it."""
    if message.WhichOneof("kind") != "step":
        return
    missing = min(message.step.payload_bytes, PAYLOAD_BYTES) - len(message.chunk)
    with contextlib.suppress(TimeoutError):  # whoever takes longer hears of it by the stream's end
        async with asyncio.timeout(DROP_S):
            while missing > 0:
                more = await anext(requests, None)
                if more is None or not more.chunk:
                    return
                missing -= len(more.chunk)


def _step_id(message: pb.InferRequest) -> int:
    return int(message.step.step_id) if message.WhichOneof("kind") == "step" else 0
