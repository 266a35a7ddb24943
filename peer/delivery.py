"""A delivery: a step that has arrived whole."""

from __future__ import annotations

from dataclasses import dataclass

from peer.accounts import Account
from peer.budget import MessageBudget
from protocol.messages import Step


@dataclass(slots=True, eq=False)
class Delivery:
    """A step that has arrived whole, and what it holds of the message budget until it is computed."""

    step: Step
    arrived_s: float
    nbytes: int
    pushed: bool  # by the peer before this one; else sent by the client
    account: Account | None = None  # whose it is
    tokens: int = 0  # of that account, likewise

    def release(self, messages: MessageBudget) -> None:
        messages.release(self.nbytes)
        if self.account is not None:
            self.account.release(self.nbytes, self.tokens)
        self.nbytes = self.tokens = 0
