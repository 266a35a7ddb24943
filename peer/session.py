"""Sessions: one client's KV cache over (part of) the peer's span, and the table that holds them within the budget.

A session outlives its stream for a while, so that a client whose connection broke can resume where it was. Times are
passed in: the table has no clock. The event loop opens and drops sessions, the compute thread grows their reservations:
one lock, held for microseconds, keeps the budget right between them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from peer.budget import RETRY_AFTER_S, KvBudget
from protocol.errors import BadMessage, PeerDraining, PeerFull, SessionLost, StaleEpoch, WrongModel
from protocol.messages import Open, StepResult
from protocol.span import Span
from slicing import SpanCache, SpanModel

RESERVE_TOKENS = 64  # an unannounced session's budget grows by this many tokens per row


@dataclass(slots=True, eq=False)
class Session:
    """State of one session on this peer. `cache`, `next_step` and `last_result` belong to the compute thread, the rest
    to the event loop."""

    session_id: bytes
    epoch: int
    span: Span
    codec: str
    cache: SpanCache | None  # None: stateless
    reserved: int = 0  # block-tokens taken from the budget
    next_step: int = 0
    last_result: StepResult | None = None  # of step `next_step - 1`, for a client that asks again
    broken: bool = False  # dropped, or a step failed half-way: the cache can no longer be trusted
    attached: int = 0  # streams that use it now
    last_used_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens per row in the cache."""
        return 0 if self.cache is None else self.cache.n_tokens


@dataclass(slots=True)
class SessionTable:
    """All sessions of a peer.

    Args:
        model: makes the caches.
        fingerprint: of the model that is served.
        budget: KV tokens over all sessions.
        max_sessions: sessions at once.
        codecs: what results can be encoded with.
        idle_s: a session without a step for so long is dropped.
        resume_s: so long a session without a stream waits for its client to come back.
    """

    model: SpanModel
    fingerprint: str
    budget: KvBudget
    codecs: frozenset[str]
    max_sessions: int
    idle_s: float
    resume_s: float
    draining: bool = False
    ended: int = 0  # sessions that were closed or dropped so far
    _sessions: dict[tuple[bytes, int], Session] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, request: Open, now_s: float) -> Session:
        """The session that `request` opens or resumes, attached to the caller's stream.

        Raises:
            WrongModel, StaleEpoch, SessionLost, PeerFull, PeerDraining.
            BadMessage: the codec is not known, the model cannot be cut there, or the session is open already.
        """
        if request.fingerprint != self.fingerprint:
            raise WrongModel("this peer serves another model, or other weights under the same name")
        if not self.model.span.covers(request.span):
            raise WrongModel(f"this peer serves the blocks {self.model.span}, not {request.span}")
        if request.codec not in self.codecs:
            raise BadMessage(f"no codec {request.codec!r} here; there are {', '.join(sorted(self.codecs))}")
        key = (request.session_id, request.span.start)
        known = self._sessions.get(key)
        if known is not None and request.epoch < known.epoch:
            raise StaleEpoch(f"the session is at epoch {known.epoch} already, not {request.epoch}")
        session = self._resumed(known, request) if request.resume else self._new(known, request, key)
        session.attached += 1
        session.last_used_s = now_s
        return session

    def _resumed(self, known: Session | None, request: Open) -> Session:
        if known is None or known.broken or known.span != request.span:
            raise SessionLost("this peer does not (or no longer) hold that session; replay it")
        known.epoch = request.epoch
        return known

    def _new(self, known: Session | None, request: Open, key: tuple[bytes, int]) -> Session:
        if known is not None:
            if request.epoch == known.epoch and not known.broken:
                raise BadMessage("that session is open already; resume it, or open it with a newer epoch")
            self._drop(known)
        if self.draining:
            raise PeerDraining("this peer is leaving and takes no new sessions")
        if len(self._sessions) >= self.max_sessions:
            raise PeerFull(f"this peer holds {self.max_sessions} sessions already", retry_after_s=RETRY_AFTER_S)
        cache = None if request.stateless else self.model.new_cache(request.span)
        reserved = 0 if request.stateless else request.batch * request.max_tokens * len(request.span)
        with self._lock:
            self.budget.reserve(reserved)
        session = Session(request.session_id, request.epoch, request.span, request.codec, cache, reserved)
        self._sessions[key] = session
        return session

    def ensure_room(self, session: Session, rows: int, tokens: int) -> None:
        """Makes sure that `rows` x `tokens` are reserved for the session.

        Raises:
            PeerFull: the budget does not allow it; the session stays as it was.
            SessionLost: the session was dropped meanwhile.
        """
        if rows * tokens * len(session.span) <= session.reserved:
            return
        rounded = -(-tokens // RESERVE_TOKENS) * RESERVE_TOKENS
        wanted = rows * rounded * len(session.span)
        with self._lock:
            if session.broken:
                raise SessionLost("the session was dropped while its step waited; replay it")
            self.budget.reserve(wanted - session.reserved)
            session.reserved = wanted

    def detach(self, session: Session, now_s: float) -> None:
        """The session's stream ended without a Close; a broken session goes at once."""
        session.attached -= 1
        session.last_used_s = now_s
        if session.broken or session.cache is None:
            self._drop(session)

    def close(self, session: Session) -> None:
        """Frees the session's cache and budget."""
        self._drop(session)

    def reclaim(self, now_s: float) -> int:
        """Drops sessions that were idle, or without a stream, for too long. Returns how many."""
        dead = [s for s in self._sessions.values() if now_s - s.last_used_s > self._patience_s(s)]
        for session in dead:
            self._drop(session)
        return len(dead)

    def _patience_s(self, session: Session) -> float:
        return self.idle_s if session.attached > 0 else self.resume_s

    def _drop(self, session: Session) -> None:
        key = (session.session_id, session.span.start)
        if self._sessions.get(key) is session:
            del self._sessions[key]
            self.ended += 1
            with self._lock:
                self.budget.release(session.reserved)
                session.reserved = 0
                session.broken = True
            session.cache = None
            session.last_result = None
