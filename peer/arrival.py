"""An arrival: what comes on a stream and is not whole yet."""

from __future__ import annotations

import time

from peer.accounts import Account
from peer.budget import MessageShare
from peer.delivery import Delivery
from peer.session import Session
from peer.table import SessionTable
from protocol import potluck_pb2 as pb
from protocol.errors import PeerFull
from protocol.frames import RequestAssembler
from protocol.messages import HIDDEN, Close, Open, Route, Step

STALL_S = 20.0  # between two messages of one step; a chunk of 128 KiB takes less on the slowest line
SLOWEST_BYTES_S = 8 << 10  # a step that comes more slowly, after STALL_S, does not come


class Arrival:
    """What arrives on one stream and is not whole yet, and what that holds of the message budget and an account.

    Args:
        max_payload_bytes: a larger step is refused by its header.

    Attributes:
        session: whose steps these are; None: it was not opened yet.
    """

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
        """Gives back what is held: the step will not be whole."""
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
