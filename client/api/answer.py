"""One answer: what it is to be, and what it says while it is made."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from transformers import LogitsProcessor

from client.api.prompts import Ids
from client.api.sampling import Sampling
from client.conversation import GenerationSession
from client.model import SwarmModel
from client.session import Session
from client.trace import Trace, trace_of

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one answer is to be.

    Attributes:
        max_tokens: the longest that it may be.
        reserves: ask the peers for room for all of it at once; else it takes room as it grows.
        stops: strings that end it, and are no part of it.
        logprobs: tell of each token how likely it was, and so many others; None: do not.
        keeps_special: write special tokens, too.
        guard: made when the answer begins: allows only some tokens. See `client.api.grammar`.
        in_pieces: hand the text over as it comes; else all of it at the end.
    """

    ids: Ids
    max_tokens: int
    sampling: Sampling
    reserves: bool = False
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    keeps_special: bool = False
    guard: Callable[[], LogitsProcessor] | None = None
    in_pieces: bool = True


@dataclass(frozen=True, slots=True)
class TokenProb:
    """A token, its logarithmic probability, and the likeliest ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown now, and the tokens that came since the last piece, where that was asked for."""

    text: str
    probs: tuple[TokenProb, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ended, and how many tokens it had, the one that ended it included."""

    reason: Reason
    tokens: int


Said = tuple[int, Piece | Ending | Exception]
"""What an answer of this number says."""


@dataclass(slots=True)
class Timing:
    """Seconds of the monotonic clock at which an answer was asked for, got its thread, had its first and last token."""

    asked_s: float = field(default_factory=time.monotonic)
    began_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None


class Answer:
    """One answer. Belongs to the event loop, but for what the thread that generates it calls."""

    def __init__(self, order: Order, index: int, said: asyncio.Queue[Said], over: Callable[[Answer], None]) -> None:
        self.order = order
        self.index = index
        self.timing = Timing()
        self.tokens = 0
        self.reroutes = 0
        self.last_trace: Trace | None = None  # once it has ended
        self.ending: Ending | None = None
        self.future: concurrent.futures.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._said = said
        self._over = over
        self._cancelled = threading.Event()
        self._model: SwarmModel | None = None
        self._session: GenerationSession | None = None

    def cancel(self) -> None:
        """Nobody wants it any more: it ends now, and its session is freed."""
        self._cancelled.set()
        if self.future is not None and self.future.cancel():
            self._over(self)
        elif self._model is not None and self._session is not None:
            self._model.blocks.interrupt(self._session.cache)

    @property
    def is_cancelled(self) -> bool:
        """Does nobody want it any more? For any thread."""
        return self._cancelled.is_set()

    @property
    def outcome(self) -> str:
        """Why it ended, once it has."""
        if self.ending is not None:
            return self.ending.reason
        return "cancelled" if self.is_cancelled else "failed"

    @property
    def _on_peers(self) -> Session | None:
        """Its session on the peers; None before the first step and after the last one. For any thread."""
        if self._model is None or self._session is None:
            return None
        return self._model.blocks.session_of(self._session.cache)

    @property
    def trace(self) -> Trace | None:
        """What became of its steps so far; None before the first one. For any thread."""
        session = self._on_peers
        return self.last_trace if session is None else trace_of(session)

    # ------------------------------------------------------------------ called in the thread that generates

    def attach(self, model: SwarmModel, session: GenerationSession) -> None:
        """It begins, with this session."""
        self.timing.began_s = time.monotonic()
        self._model, self._session = model, session

    def say(self, what: Piece | Ending | Exception) -> None:
        """To whoever listens. What is said after the loop has ended is said to nobody."""
        if isinstance(what, Ending):
            self.ending = what
        self._soon(self._said.put_nowait, (self.index, what))

    def end(self) -> None:
        """Its thread is free again."""
        self._soon(self._over, self)

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)
