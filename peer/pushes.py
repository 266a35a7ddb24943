"""Pushes: the stream on which the peer before this one hands steps over, those of many sessions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from peer.arrival import Arrival
from peer.house import House
from peer.replies import SEND_TIMEOUT_S
from peer.session import Session
from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, PeerFull, PotluckError, StaleEpoch
from protocol.messages import Failure, Step

logger = logging.getLogger(__name__)

PUSH_DEBT_S = 5.0  # pushes are refused that came so much faster than their client's rate
PUSH_IDLE_S = 600.0  # a stream of pushes without any; its other side ends it after half of that
MOST_REFUSED = 256  # pushes in a row of which none is taken: whoever sends them has no session here


class Pushes:
    """One stream of them; each bears the token of the edge over which it comes."""

    def __init__(self, house: House, context: Any) -> None:
        self._house = house
        self._context = context
        self._arriving: dict[bytes, Arrival] = {}  # the steps that are not whole yet, by edge
        self._step_ids: dict[bytes, int] = {}  # of these

    async def run(self, requests: AsyncIterator[pb.PushRequest]) -> None:
        """Until the stream ends, or is of no use."""
        try:
            await self._take_all(requests)
        finally:
            for half in self._arriving.values():
                half.release()

    async def _take_all(self, requests: AsyncIterator[pb.PushRequest]) -> None:
        refused = 0  # in a row
        while (message := await self._next(requests)) is not None:
            if message.request.WhichOneof("kind") == "step":
                self._step_ids[message.edge] = message.request.step.step_id
                await self._house.intake.make_way(self._house.sessions.at_edge(message.edge), message.request)
            try:
                if self._take(message):
                    refused = 0
            except PotluckError as error:
                refused += 1
                if not await self._refuse(message.edge, error) or refused >= MOST_REFUSED:
                    return
            if message.edge not in self._arriving:
                self._step_ids.pop(message.edge, None)

    async def _next(self, requests: AsyncIterator[pb.PushRequest]) -> pb.PushRequest | None:
        """None: the stream has ended, or nothing comes any more."""
        now_s = time.monotonic()
        left_s = min(
            (left for half in self._arriving.values() if (left := half.patience_s(now_s)) is not None),
            default=PUSH_IDLE_S,
        )
        try:
            async with asyncio.timeout(left_s):
                return await anext(requests, None)
        except TimeoutError:
            logger.info("a peer that pushed has fallen silent; its stream is ended")
            return None

    def _take(self, message: pb.PushRequest) -> bool:
        """One message. Is it of any session?

        Raises:
            StaleEpoch: nobody takes steps under that token.
            PeerFull, WireError: the step is refused.
        """
        kind = message.request.WhichOneof("kind")
        if kind not in ("step", "more"):
            raise BadMessage("only steps can be pushed")
        half = self._arriving.get(message.edge)
        if half is None:
            if kind == "more":
                return False  # of a step that was refused
            session = self._house.sessions.by_edge(message.edge)
            half = self._arriving[message.edge] = self._house.intake.arrival()
            half.session = session
        try:
            self._charge(half.session, message)
            step = half.feed(message.request)
            if not isinstance(step, Step):
                return True
            session = self._house.sessions.by_edge(message.edge)
            if step.epoch != session.epoch:
                raise StaleEpoch(f"the session is at epoch {session.epoch}, not {step.epoch}")
        except PotluckError:
            half.release()
            del self._arriving[message.edge]
            raise
        del self._arriving[message.edge]
        self._house.intake.take(session, half.hand_over(step, pushed=True))
        return True

    def _charge(self, session: Session | None, message: pb.PushRequest) -> None:
        """The stream carries steps of many clients, so that it is not read more slowly for one of them.

        Raises:
            PeerFull: that one has sent far more than its rate.
        """
        pause_s = self._house.intake.pause_s(session, len(message.request.chunk))
        if pause_s > PUSH_DEBT_S and message.request.WhichOneof("kind") == "step":
            raise PeerFull("more is pushed for this client than it may send", retry_after_s=pause_s)

    async def _refuse(self, edge: bytes, error: PotluckError) -> bool:
        """Has the other side taken that answer?"""
        self._house.tally.refusals[error.code] += 1
        refusal = Failure(error, self._step_ids.get(edge, 0)).to_proto().failure
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._context.write(pb.PushReply(edge=edge, failure=refusal))
        except TimeoutError:
            logger.info("a peer that pushes does not read what it is told; its stream is ended")
            return False
        return True
