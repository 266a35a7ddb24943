"""Sessions: one client's KV cache over (part of) the peer's span, and the table that holds them within the budget.

A session outlives its stream for a while, so that a client whose connection broke can resume where it was. Times are
passed in: the table has no clock. The event loop opens and drops sessions, the compute thread grows their reservations:
one lock, held for microseconds, keeps the budget right between them.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from peer.accounts import Account
from peer.budget import RETRY_AFTER_S, JournalBudget, KvBudget, MessageBudget
from protocol.errors import BadMessage, NotAdmitted, PeerDraining, PeerFull, SessionLost, StaleEpoch, WrongModel
from protocol.journal import Entry, StepLog
from protocol.limits import MAX_LINES
from protocol.messages import CacheOp, HopTrace, Open, Route, Step
from protocol.receipts import Line
from protocol.span import Span
from slicing import PagedCache, RaggedSpan, SpanCache, SpanModel
from slicing.paged import PAGE_TOKENS, pages

NEWEST_SHARE = 0.05  # of the newest session in what sessions use of what they announce
AWAY_SHARE = 0.3  # of the newest time in the mean of how long a session is away
AWAY_MOST = 3.0  # times the mean: somebody who stopped to think says little
WATERMARK = 0.9
"""Of the budget: above it no session is opened beside others; what is left is for those that there are to grow."""


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


class Owner(Protocol):
    """The client's stream to which a session belongs."""

    async def leave(self) -> None:
        """Another stream takes the session over."""

    def end(self) -> None:
        """The session was dropped, since nothing was done with it."""


class ClientLeft(Exception):
    """The client's stream has ended; whatever was to be said to it is moot."""


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


@dataclass(slots=True)
class SessionTable:
    """All sessions of a peer.

    Args:
        model: makes the caches.
        ragged: there if sessions of one row can share passes.
        fingerprint: of the model that is served.
        n_blocks: of that model; sessions that end before the last one keep a journal.
        budget: KV tokens over all sessions.
        journals: bytes of the journals of all sessions.
        messages: bytes of all steps that arrive, wait or run.
        max_sessions: sessions at once.
        codecs: what results can be encoded with.
        idle_s: a session without a step for so long is dropped.
        resume_s: so long a session without a stream waits for its client to come back.
    """

    model: SpanModel
    ragged: RaggedSpan | None
    fingerprint: str
    n_blocks: int
    budget: KvBudget
    journals: JournalBudget
    messages: MessageBudget
    codecs: frozenset[str]
    max_sessions: int
    idle_s: float
    resume_s: float
    draining: bool = False
    opened: int = 0  # sessions so far
    ended: int = 0  # of these, closed or dropped
    preempted: int = 0  # of these, to make room for older ones
    used_share: float = 1.0  # of what sessions announce, that they come to use
    _sessions: dict[bytes, Session] = field(default_factory=dict)
    _by_edge: dict[bytes, Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def find(self, session_id: bytes) -> Session | None:
        """The session of that id, which only its client knows."""
        return self._sessions.get(session_id)

    def at_edge(self, edge: bytes) -> Session | None:
        """The session into which the holder of the token `edge` may push."""
        return self._by_edge.get(edge)

    def by_edge(self, edge: bytes) -> Session:
        """As `at_edge`.

        Raises:
            StaleEpoch: there is none: the session has moved on, or ended.
        """
        session = self.at_edge(edge)
        if session is None:
            raise StaleEpoch("no session takes steps under that token, or no longer")
        return session

    @property
    def tokens_left(self) -> int:
        """Tokens per row over the whole span that a new session may hope for."""
        return max(0, self.budget.tokens_total - self._expected(list(self._sessions.values())) // len(self.model.span))

    def _expected(self, sessions: Iterable[Session]) -> int:
        """Block-tokens that these will come to use. For both threads: give it a copy, since sessions come and go."""
        return sum(max(s.reserved, int(self.used_share * s.announced)) for s in sessions)

    def newest(self, after: Session, without: Collection[bytes]) -> Session | None:
        """The session with room of its own that was opened last, and after `after`; `without` those of these ids."""
        younger = [
            s for s in self._sessions.values() if s.number > after.number and s.reserved and s.session_id not in without
        ]
        return max(younger, key=lambda session: session.number, default=None)

    def open(self, request: Open, now_s: float, account: Account | None = None) -> Session:
        """The session that `request` opens or resumes, attached to the caller's stream. Outputs wait for a route.

        Args:
            account: whose it is.

        Raises:
            WrongModel, StaleEpoch, SessionLost, PeerFull, PeerDraining, NotAdmitted.
            BadMessage: the codec is not known, the model cannot be cut there, or the session is open already.
        """
        if request.fingerprint != self.fingerprint:
            raise WrongModel("this peer serves another model, or other weights under the same name")
        if not self.model.span.covers(request.span):
            raise WrongModel(f"this peer serves the blocks {self.model.span}, not {request.span}")
        if request.codec not in self.codecs:
            raise BadMessage(f"no codec {request.codec!r} here; there are {', '.join(sorted(self.codecs))}")
        known = self._sessions.get(request.session_id)
        if known is not None and request.client_key != known.client_key:
            raise NotAdmitted("that session was opened with another key")
        if known is not None and request.epoch < known.epoch:
            raise StaleEpoch(f"the session is at epoch {known.epoch} already, not {request.epoch}")
        if request.edge and self._by_edge.get(request.edge, known) is not known:
            raise BadMessage("that token belongs to another session's edge")
        session = self._resumed(known, request) if request.resume else self._new(known, request, account)
        self._by_edge.pop(session.edge, None)
        session.edge = request.edge
        if request.edge:
            self._by_edge[request.edge] = session
        session.epoch, session.route, session.undelivered = request.epoch, None, ""
        session.interrupt()
        session.account = account
        session.attached += 1
        session.last_used_s = now_s
        return session

    def _resumed(self, known: Session | None, request: Open) -> Session:
        if known is None or known.broken or known.span != request.span:
            raise SessionLost("this peer does not (or no longer) hold that session; replay it")
        return known

    def _new(self, known: Session | None, request: Open, account: Account | None) -> Session:
        if known is not None:
            if request.epoch == known.epoch and not known.broken:
                raise BadMessage("that session is open already; resume it, or open it with a newer epoch")
            self._drop(known)
        if self.draining:
            raise PeerDraining("this peer is leaving and takes no new sessions")
        if len(self._sessions) >= self.max_sessions:
            raise PeerFull(f"this peer holds {self.max_sessions} sessions already", retry_after_s=RETRY_AFTER_S)
        announced = 0 if request.stateless else request.batch * request.max_tokens * len(request.span)
        self._admit(announced, account)
        outputs = StepLog(keeps_all=not request.stateless and request.span.stop < self.n_blocks)
        self.opened += 1
        session = Session(
            request.session_id,
            request.epoch,
            request.span,
            request.codec,
            self._new_cache(request),
            outputs,
            number=self.opened,
            client_key=request.client_key,
            announced=announced,
        )
        self._sessions[request.session_id] = session
        return session

    def _admit(self, announced: int, account: Account | None) -> None:
        """Raise PeerFull unless the session will probably find room, beside what those that there are will grow to.

        Who is alone may fill the cache. When others come, whoever has several sessions, and by them more than a
        client's share, gives up the newest of them.
        """
        total = self.budget.tokens_total * len(self.model.span)
        wanted = int(self.used_share * announced)
        if account is not None:
            self._check_account(account, wanted, total)
        while announced > total or (
            self._sessions and self._expected(self._sessions.values()) + wanted > WATERMARK * total
        ):
            victim = None if announced > total or account is None else self._beyond_share(account, total)
            if victim is None:
                raise PeerFull(
                    f"this peer's KV budget is used up: {self.tokens_left} of {self.budget.tokens_total} tokens "
                    "are left",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._drop(victim)
            self.preempted += 1
            if victim.owner is not None:
                victim.owner.end()

    def _check_account(self, account: Account, wanted: int, total: int) -> None:
        """Raise PeerFull if one client would have too much of this peer."""
        mine, allowance = self._of(account.name), account.allowance
        if len(mine) >= allowance.sessions:
            raise PeerFull(f"this client has {len(mine)} sessions here already", retry_after_s=RETRY_AFTER_S)
        if mine and self.has_others(account) and self._expected(mine) + wanted > allowance.share * total:
            raise PeerFull(
                f"this client would have more than {allowance.share:.0%} of this peer's cache while others have "
                "sessions",
                retry_after_s=RETRY_AFTER_S,
            )

    def _beyond_share(self, account: Account, total: int) -> Session | None:
        """The newest session of a client other than `account` that has several, and more than its share."""
        share = account.allowance.share * total
        greedy = {
            name
            for name in {session.client for session in self._sessions.values()} - {account.name}
            if len(mine := self._of(name)) > 1 and self._expected(mine) > share
        }
        theirs = [session for session in self._sessions.values() if session.client in greedy]
        return max(theirs, key=lambda session: session.number, default=None)

    def _of(self, client: str) -> list[Session]:
        return [session for session in self._sessions.values() if session.client == client]

    def has_others(self, account: Account) -> bool:
        """Are there sessions of other clients?"""
        return any(session.client != account.name for session in self._sessions.values())

    def most_bytes(self, account: Account) -> int:
        """Of the memory for steps, that one client may have now."""
        total = self.messages.bytes_total
        return int(account.allowance.share * total) if self.has_others(account) else total

    def _new_cache(self, request: Open) -> SpanCache | PagedCache | None:
        if request.stateless:
            return None
        if self.ragged is None or request.batch > 1:
            return self.model.new_cache(request.span)
        return PagedCache(self.model.part(request.span))

    def ensure_room(self, session: Session, rows: int, tokens: int) -> None:
        """Makes sure that `rows` x `tokens` are reserved for the session.

        Raises:
            PeerFull: the budget does not allow it; the session stays as it was.
            SessionLost: the session was dropped meanwhile.
        """
        if session.cache is None or rows * tokens * len(session.span) <= session.reserved:
            return
        wanted = rows * pages(tokens) * PAGE_TOKENS * len(session.span)
        with self._lock:
            if session.broken:
                raise SessionLost("the session was dropped while its step waited; replay it")
            self.budget.reserve(wanted - session.reserved)
            session.reserved = wanted
        if isinstance(session.cache, PagedCache):
            session.cache.reserve(tokens)

    def replace_cache(self, session: Session, cache: SpanCache) -> None:
        """The session goes on with another cache of the same tokens."""
        with self._lock:
            if not session.broken:
                session.cache = cache

    def remember(self, session: Session, output: Entry) -> None:
        """Keeps the output of the session's latest step, until the next hop, or a replacement of it, has it."""
        with self._lock:
            if not session.broken:
                session.outputs.put(output)
                self.journals.keep(session.outputs)

    def detach(self, session: Session, now_s: float) -> None:
        """The session's stream ended without a Close; a broken session goes at once."""
        session.attached -= 1
        session.last_used_s = now_s
        if session.broken or session.cache is None:
            self._drop(session)
            session.drop_deliveries(self.messages)

    def close(self, session: Session) -> None:
        """Frees the session's cache and budget."""
        self._drop(session)

    def reclaim(self, now_s: float) -> int:
        """Drops sessions that were idle, or without a stream, for too long. Returns how many."""
        dead = [s for s in self._sessions.values() if now_s - s.last_used_s > self._patience_s(s)]
        for session in dead:
            self._drop(session)
            if session.owner is not None:
                session.owner.end()
        return len(dead)

    def _patience_s(self, session: Session) -> float:
        return self.idle_s if session.attached > 0 else self.resume_s

    def _drop(self, session: Session) -> None:
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
            self._by_edge.pop(session.edge, None)
            self.ended += 1
            if session.announced:
                share = min(1.0, session.reserved / session.announced)
                self.used_share += NEWEST_SHARE * (share - self.used_share)
            with self._lock:
                self.budget.release(session.reserved)
                session.reserved = 0
                session.broken = True
                self.journals.forget(session.outputs)
            session.drop_deliveries(self.messages)
            session.cache = None
            session.outputs = StepLog(keeps_all=False)


def tokens_after(tokens: int, ops: Iterable[CacheOp]) -> int:
    """Tokens per row in a cache of `tokens`, once `ops` are applied."""
    for op in ops:
        if op.kind == "reset":
            tokens = 0
        elif op.kind == "crop":
            tokens = min(tokens, op.values[0])
    return tokens
