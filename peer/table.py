"""The table that holds all sessions of a peer, within its budgets.

Times are passed in: the table has no clock. The event loop opens and drops sessions, the compute thread grows their
reservations: one lock, held for microseconds, keeps the budget right between them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from peer.accounts import Account
from peer.budget import RETRY_AFTER_S, JournalBudget, KvBudget, MessageBudget
from peer.room import Room, has_others
from peer.session import Session
from protocol.errors import BadMessage, NotAdmitted, PeerDraining, PeerFull, SessionLost, StaleEpoch, WrongModel
from protocol.journal import Entry, StepLog
from protocol.messages import Open
from slicing import PagedCache, RaggedSpan, SpanCache, SpanModel
from slicing.paged import PAGE_TOKENS, pages


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
    room: Room = field(init=False)
    _sessions: dict[bytes, Session] = field(default_factory=dict)
    _by_edge: dict[bytes, Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.room = Room(self.budget, len(self.model.span))

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        """For any thread: of a copy."""
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
        return self.room.tokens_left(self)

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
        """Raise PeerFull unless there is room. When others come, whoever has several sessions, and by them more than a
        client's share, gives up the newest of them."""
        wanted, is_too_large = self.room.likely(announced), announced > self.room.total
        if account is not None:
            self.room.check_account(account, wanted, self._sessions.values())
        while is_too_large or not self.room.is_there(wanted, self._sessions.values()):
            victim = None
            if account is not None and not is_too_large:
                victim = self.room.beyond_share(account, self._sessions.values())
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

    def most_bytes(self, account: Account) -> int:
        """Of the memory for steps, that one client may have now."""
        total = self.messages.bytes_total
        return int(account.allowance.share * total) if has_others(account, self._sessions.values()) else total

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
            self.room.note_end(session)
            with self._lock:
                self.budget.release(session.reserved)
                session.reserved = 0
                session.broken = True
                self.journals.forget(session.outputs)
            session.drop_deliveries(self.messages)
            session.cache = None
            session.outputs = StepLog(keeps_all=False)
