"""A pump: takes one session's steps in order, has them computed, and hands their outputs on.

    deliveries -> engine -> outputs (kept in the session) -> next peer's `Push`, or the client's `Infer`

One task per stream of a client, so that a session's steps and outputs never overtake each other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from peer.compute import ComputeThread
from peer.engine import Engine
from peer.links import Links
from peer.receipts import Receipts
from peer.session import ClientLeft, Delivery, Rerouted, Session, SessionTable
from peer.tally import Tally
from protocol import potluck_pb2 as pb
from protocol.errors import PeerError, PeerFault, PeerLost, PotluckError, StaleEpoch, WireError
from protocol.frames import result_frames
from protocol.journal import Entry
from protocol.messages import Failure, Route, StepResult

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 20.0  # one message; a client that takes none for so long is not waited for


class ReplyStream:
    """What goes back to the client of one `Infer`; replies of several messages are not mixed.

    Raises:
        ClientLeft: by every method: there is nobody any more to hear it.
    """

    def __init__(self, context: Any, tally: Tally) -> None:
        self._context = context
        self._tally = tally
        self._lock = asyncio.Lock()

    async def send(self, *replies: pb.InferReply) -> None:
        async with self._lock:
            for reply in replies:
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_S):
                        await self._context.write(reply)
                except Exception as error:  # grpc.aio has many words for it, none of them public
                    raise ClientLeft(str(error)) from error

    async def fail(self, error: PotluckError, step_id: int = 0, *, fatal: bool = False) -> None:
        self._tally.refusals[error.code] += 1
        await self.send(Failure(error, step_id, fatal).to_proto())


class Pump:
    """Runs one session's steps for as long as its client's stream lives."""

    def __init__(
        self,
        session: Session,
        sessions: SessionTable,
        engine: Engine,
        compute: ComputeThread,
        links: Links,
        client: ReplyStream,
        tally: Tally,
        receipts: Receipts,
    ) -> None:
        self._session = session
        self._sessions = sessions
        self._engine = engine
        self._compute = compute
        self._links = links
        self._client = client
        self._tally = tally
        self._receipts = receipts

    async def run(self) -> None:
        """Until it is cancelled, or a step broke the protocol: the client has been told, the stream must end."""
        session = self._session
        while True:
            delivery = await session.deliveries.get()
            try:
                if delivery is not None:
                    try:
                        await self._execute(delivery)
                    finally:
                        delivery.release(self._sessions.messages)
                await self._hand_on()
                if (receipt := await self._receipts.due(session)) is not None:
                    await self._client.send(receipt.to_proto())
            except StaleEpoch as error:  # overtaken by a new epoch while it waited: nobody asks for it any more
                logger.debug("a step was dropped: %s", error)
            except PotluckError as error:
                fatal = isinstance(error, WireError)
                await self._client.fail(error, delivery.step.step_id if delivery else 0, fatal=fatal)
                if fatal:
                    return

    async def _execute(self, delivery: Delivery) -> None:
        session, step = self._session, delivery.step
        if session.lacks_before(step):
            session.received = session.next_step  # who asks where the steps are learns that they have to come again
            if delivery.pushed:
                return
            raise PeerLost("steps before this one were lost on their way here")
        if session.outputs.holds(step.step_id) and not delivery.pushed:
            session.sent = min(session.sent, step.step_id)  # the client asks again
        session.last_used_s = time.monotonic()
        try:
            await self._engine.execute(session, delivery)
        except PotluckError:
            session.running = None  # its traceback knows the session: no cycle is to keep both
            raise
        except Exception as error:
            session.running = None
            logger.exception("a step failed before it was applied")
            raise PeerFault(f"the step failed on this peer: {type(error).__name__}") from error

    async def _hand_on(self) -> None:
        """Hands on the outputs that the next hop lacks, in order. Begins anew whenever the route changes meanwhile."""
        session = self._session
        while (route := session.route) is not None:
            turn, first = session.turn, session.sent
            pending = await self._pending()
            if session.turn == turn and not pending:
                return
            for output in pending:
                if session.turn != turn:
                    break
                try:
                    await self._hand_on_one(output, route)
                except Rerouted:
                    break
                except PeerError as error:
                    if session.turn == turn:  # what was written before may be lost with the stream
                        session.fall_back(error.message, sent=first)
                    break
                if session.turn == turn:
                    session.sent = output.step_id + 1

    async def _pending(self) -> list[Entry]:
        session, latest = self._session, self._session.outputs.latest
        if latest is None or latest.step_id < session.sent:
            return []
        if latest.step_id == session.sent and session.running is not None and session.running.done():
            return [latest]
        # The outputs belong to the compute thread.
        return await self._compute.run(session.outputs.since, session.sent)

    async def _hand_on_one(self, output: Entry, route: Route) -> None:
        session = self._session
        step = output.step(session.epoch)
        pushes = bool(route.peer_id) and not session.undelivered
        if pushes:
            session.handing_on = self._links.push(route.peer_id, route.edge, step)
            try:
                await session.handing_on
            finally:
                session.handing_on = None
        else:
            await self._client.send(*result_frames(StepResult(step, session.undelivered)))
        way = "pushed" if pushes else "relayed" if route.peer_id else "answered"
        self._tally.handed_on[way] += 1
        self._tally.tokens_out += output.rows * output.tokens
        self._tally.bytes_out += output.nbytes
