"""A pump: takes one session's steps in order, has them computed, and hands their outputs on.

    deliveries -> engine -> outputs (kept in the session) -> next peer's `Push`, or the client's `Infer`

One task per stream of a client, so that a session's steps and outputs never overtake each other.
"""

from __future__ import annotations

import logging
import time

from peer.delivery import Delivery
from peer.house import House
from peer.replies import ReplyStream
from peer.session import Rerouted, Session
from protocol.errors import PeerError, PeerFault, PeerLost, PotluckError, StaleEpoch, WireError
from protocol.frames import result_frames
from protocol.journal import Entry
from protocol.messages import Route, StepResult

logger = logging.getLogger(__name__)


class Pump:
    """Runs one session's steps for as long as its client's stream lives."""

    def __init__(self, house: House, session: Session, client: ReplyStream) -> None:
        self._house = house
        self._session = session
        self._client = client

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
                        delivery.release(self._house.sessions.messages)
                await self._hand_on()
                if (receipt := await self._house.receipts.due(session)) is not None:
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
            await self._house.engine.execute(session, delivery)
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
        return await self._house.compute.run(session.outputs.since, session.sent)

    async def _hand_on_one(self, output: Entry, route: Route) -> None:
        session = self._session
        step = output.step(session.epoch)
        pushes = bool(route.peer_id) and not session.undelivered
        if pushes:
            assert self._house.links is not None
            session.handing_on = self._house.links.push(route.peer_id, route.edge, step)
            try:
                await session.handing_on
            finally:
                session.handing_on = None
        else:
            await self._client.send(*result_frames(StepResult(step, session.undelivered)))
        way = "pushed" if pushes else "relayed" if route.peer_id else "answered"
        tally = self._house.tally
        tally.handed_on[way] += 1
        tally.tokens_out += output.rows * output.tokens
        tally.bytes_out += output.nbytes
