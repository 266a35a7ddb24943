"""A visit: one client's stream, from its opening a session to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from peer.accounts import home_of
from peer.arrival import Arrival
from peer.house import House
from peer.pump import Pump
from peer.replies import ClientLeft, ReplyStream
from peer.session import Session
from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, NotAdmitted, PeerLost, PotluckError, WireError
from protocol.limits import PAYLOAD_BYTES
from protocol.messages import Close, Notice, Open, Opened, Route, Step
from tensor_codecs import dtype_name

logger = logging.getLogger(__name__)

OPEN_S = 10.0  # from a stream's beginning, or its last refusal, until it opens a session
DROP_S = 30.0  # for the rest of a step that was refused


class Visit:
    """One client's `Infer` stream, from its Open to its end.

    Args:
        client: is told what there is to tell.
        connection: as gRPC names it; as which the client counts where clients share.
    """

    def __init__(self, house: House, client: ReplyStream, connection: str) -> None:
        self.client = client
        self._connection = connection
        self._house = house
        self._session: Session | None = None
        self._pumping: asyncio.Task[None] | None = None

    async def run(self, requests: AsyncIterator[pb.InferRequest]) -> None:
        """Until the client closes the session or leaves, or one side broke the protocol."""
        arriving = self._house.intake.arrival()
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
                self._house.sessions.detach(session, time.monotonic())
                self._let_go(session)
            # Tasks that were cancelled know this visit, in cycles: these are not to keep what was under way.
            del session, self._tasks, self._reading, self._pumping

    # ------------------------------------------------------------------ what the client says

    async def _read(self, requests: AsyncIterator[pb.InferRequest], arriving: Arrival) -> None:
        while (message := await self._next(requests, arriving)) is not None:
            try:
                arriving.session = self._session
                if pause_s := self._house.intake.pause_s(self._session, len(message.chunk)):
                    await asyncio.sleep(pause_s)  # whoever sends more than its rate is read later, and so has to wait
                await self._house.intake.make_way(self._session, message)
                request = arriving.feed(message)
                if isinstance(request, Close):
                    await self._close()
                    return
                if isinstance(request, Open):
                    await self._open(request)
                elif isinstance(request, Route):
                    self._opened_session().reroute(request)
                elif isinstance(request, Step):
                    self._take(request, arriving)
            except PotluckError as error:
                # A step that was refused by its header goes on arriving: only a new stream is in order again.
                fatal = isinstance(error, WireError | NotAdmitted) or arriving.refused
                arriving.release()
                await self.client.fail(error, _step_id(message), fatal=fatal)
                if fatal:
                    await _drop_payload(message, requests)
                    return

    async def _next(self, requests: AsyncIterator[pb.InferRequest], arriving: Arrival) -> pb.InferRequest | None:
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
            account = self._house.gate.admit(request, self._connection, now_s, time.time())
            session = self._session = self._house.sessions.open(request, now_s, account)
        except PotluckError:
            await asyncio.sleep(self._house.gate.accounts.refused(home_of(self._connection), now_s))
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
        await self.client.send(self._opened(session).to_proto())
        if self._pumping is None:
            self._pumping = self._tasks.create_task(self._pump(session))

    def _opened(self, session: Session) -> Opened:
        sessions = self._house.sessions
        dtype = dtype_name(sessions.model.dtype)
        return Opened(
            session.next_step, session.tokens, sessions.tokens_left, dtype, kept_from=session.outputs.kept_from
        )

    async def _pump(self, session: Session) -> None:
        await Pump(self._house, session, self.client).run()
        self._reading.cancel()

    def _take(self, step: Step, arriving: Arrival) -> None:
        session = self._opened_session()
        self._house.intake.take(session, arriving.hand_over(step, pushed=False))

    def _opened_session(self) -> Session:
        if self._session is None:
            raise BadMessage("a step or a route before the session was opened")
        return self._session

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._house.sessions.close(session)
            self._let_go(session)
            if (receipt := await self._house.receipts.rest(session)) is not None:
                await self.client.send(receipt.to_proto())

    def _let_go(self, session: Session) -> None:
        if session.owner is self:
            session.owner = None

    # ------------------------------------------------------------------ what others say: see `peer.session.Owner`

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
