"""The intake: how steps come in, from clients and from the peers before this one."""

from __future__ import annotations

import asyncio
import contextlib
import time

from peer.accounts import Accounts
from peer.arrival import Arrival
from peer.delivery import Delivery
from peer.session import Session
from peer.table import SessionTable
from protocol import potluck_pb2 as pb
from protocol.errors import SessionLost
from protocol.frames import held_bytes

HELD_UP_S = 10.0  # for so long a step waits for those of its session that are before it


class Intake:
    """Takes steps in: none comes faster than its client may send, each finds room, and then waits in its session.

    Args:
        max_payload_bytes: a larger step is refused by its header.

    Attributes:
        begun, pushed, relayed: steps so far that came from clients at the model's first block, from the peer before
            this one, and from clients that had to carry them from there.
    """

    def __init__(self, sessions: SessionTable, accounts: Accounts, max_payload_bytes: int) -> None:
        self.begun = self.pushed = self.relayed = 0
        self._sessions = sessions
        self._accounts = accounts
        self._max_payload_bytes = max_payload_bytes

    def arrival(self) -> Arrival:
        """Of the steps of a stream, or of an edge."""
        return Arrival(self._sessions, self._max_payload_bytes)

    def pause_s(self, session: Session | None, nbytes: int) -> float:
        """`nbytes` have come for that session: seconds for which no more of its client's should be read."""
        account = None if session is None else session.account
        return self._accounts.pause_s(account, nbytes, time.monotonic())

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

    def take(self, session: Session, delivery: Delivery) -> None:
        """A step has arrived whole; what it holds of the message budget is its own until it is computed.

        Raises:
            SessionLost: the session was dropped while the step arrived.
        """
        if delivery.pushed:
            self.pushed += 1
        elif session.span.start == 0:
            self.begun += 1
        else:
            self.relayed += 1
        if session.broken:  # nobody would compute it, or give the bytes back
            delivery.release(self._sessions.messages)
            raise SessionLost("this peer does not hold that session any more; replay it")
        session.received = max(session.received, delivery.step.step_id + 1)
        session.last_used_s = time.monotonic()
        session.deliveries.put_nowait(delivery)
