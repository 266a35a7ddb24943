"""A session: one client's KV cache over (part of) the peer's span, its outputs, and where these go.

It outlives its stream for a while, so that a client whose connection broke can resume where it was.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from peer.accounts import Account
from peer.budget import MessageBudget
from peer.delivery import Delivery
from protocol.errors import StaleEpoch
from protocol.journal import StepLog
from protocol.limits import MAX_LINES
from protocol.messages import CacheOp, HopTrace, Route, Step
from protocol.receipts import Line
from protocol.span import Span
from slicing import PagedCache, SpanCache

AWAY_SHARE = 0.3  # of the newest time in the mean of how long a session is away
AWAY_MOST = 3.0  # times the mean: somebody who stopped to think says little


class Owner(Protocol):
    """The client's stream to which a session belongs."""

    async def leave(self) -> None:
        """Another stream takes the session over."""

    def end(self) -> None:
        """The session was dropped, since nothing was done with it."""


class Rerouted(Exception):  # not an error, but the end of a wait
    """While an output was handed on, the session's route changed."""


@dataclass(slots=True, eq=False)
class Session:
    """State of one session on this peer. `cache`, `next_step` and `outputs` belong to the compute thread, the rest to
    the event loop.

    Attributes:
        number: grows with each session that is opened.
        account: whose it is; None: nobody's in particular.
        client_key: with which it was opened; empty: none.
        edge: what the peer before this one shows with each step that it pushes.
        route: where outputs go; None: the client has not said yet, they wait.
        sent: the step after the last one whose output was handed on.
        deliveries: steps to compute, in order; None asks to hand on what is kept (the route changed).
        turn: grows whenever what is to be handed on, or where to, changes.
        running: the step that waits for the compute thread, or is there.
        lines: what this peer stands by and has not signed yet; steps come from the compute thread.
        decoded_s: when its last decode step was through.
        away_s: how long it took, by and by, until the next one came.
        handing_on: the push that is under way.
    """

    session_id: bytes
    epoch: int
    span: Span
    codec: str
    cache: SpanCache | PagedCache | None  # None: stateless
    outputs: StepLog
    number: int = 0
    account: Account | None = None
    client_key: bytes = b""
    edge: bytes = b""
    announced: int = 0  # block-tokens that it may come to use, by its client's word; 0: it did not say
    reserved: int = 0  # block-tokens taken from the budget
    next_step: int = 0
    broken: bool = False  # dropped, or a step failed half-way: the cache can no longer be trusted
    route: Route | None = None
    sent: int = 0
    turn: int = 0
    undelivered: str = ""  # why outputs go to the client, where the route says otherwise
    received: int = 0  # the step after the last one that has arrived whole
    arriving_bytes: int = 0  # of steps, so far, those that are not whole included
    deliveries: asyncio.Queue[Delivery | None] = field(default_factory=asyncio.Queue)
    running: asyncio.Future[HopTrace | None] | None = None
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    handing_on: asyncio.Future[None] | None = None
    attached: int = 0  # streams that use it now
    owner: Owner | None = None  # the latest of them
    last_used_s: float = 0.0
    decoded_s: float = -math.inf
    away_s: float = 0.0

    @property
    def client(self) -> str:
        """As whom the scheduler counts it."""
        return "" if self.account is None else self.account.name

    @property
    def tokens(self) -> int:
        """Tokens per row in the cache."""
        return 0 if self.cache is None else self.cache.n_tokens

    def lacks_before(self, step: Step) -> bool:
        """Has a step before this one not come, while no other is being computed? Several are on their way at once, and
        what a stream carried that broke, or what was refused, is missing before those that came after it."""
        if self.cache is None or self.broken or step.epoch < self.epoch or step.step_id <= self.next_step:
            return False
        return step.position > tokens_after(self.cache.n_tokens, step.ops)

    def came_back(self, now_s: float) -> None:
        """The next decode step is here."""
        if self.decoded_s == -math.inf:
            return
        away_s = now_s - self.decoded_s
        self.away_s += AWAY_SHARE * (min(away_s, AWAY_MOST * self.away_s) - self.away_s) if self.away_s else away_s

    @property
    def due_s(self) -> float:
        """When the next decode step is likely to come."""
        return self.decoded_s + self.away_s

    def reroute(self, route: Route) -> None:
        """Outputs go along `route` from now on, beginning with those that its next hop lacks.

        Raises:
            StaleEpoch: the route belongs to an older epoch.
        """
        if route.epoch < self.epoch:
            raise StaleEpoch(f"the session is at epoch {self.epoch} already, not {route.epoch}")
        self.route, self.sent, self.undelivered = route, route.next_step, ""
        self.interrupt()
        self.deliveries.put_nowait(None)

    def fall_back(self, why: str, sent: int) -> None:
        """The next peer could not be told: outputs from `sent` on go to the client, which finds another way."""
        self.undelivered, self.sent = why or "the next peer does not say why", sent
        self.interrupt()
        self.deliveries.put_nowait(None)

    def interrupt(self) -> None:
        """What is being handed on was for another route, or another epoch."""
        self.turn += 1
        if self.handing_on is not None and not self.handing_on.done():
            self.handing_on.set_exception(Rerouted())

    def drop_deliveries(self, messages: MessageBudget) -> None:
        """Nobody will compute what has arrived."""
        while not self.deliveries.empty():
            delivery = self.deliveries.get_nowait()
            if delivery is not None:
                delivery.release(messages)


def tokens_after(tokens: int, ops: Iterable[CacheOp]) -> int:
    """Tokens per row in a cache of `tokens`, once `ops` are applied."""
    for op in ops:
        if op.kind == "reset":
            tokens = 0
        elif op.kind == "crop":
            tokens = min(tokens, op.values[0])
    return tokens
