"""Answers under way: each an unmodified `generate` in one of a few threads, its text handed to the loop in pieces.

    request ─► Answers.begin ─► waits for a thread ─► generate ─► Follower: token ─► text ─► stops ─► Piece ─► loop

Whoever asked listens to a `Reply`, and cancels it when nobody listens to themselves any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from client.api.detokenizer import Detokenizer
from client.api.errors import Busy
from client.api.prompts import Ids, Prompts
from client.api.sampling import Sampling, choosers, processors
from client.api.stops import Stops
from client.model import GenerationSession, SwarmModel
from client.report import emit
from client.session import Session
from client.trace import Trace, trace_of
from protocol.errors import Doubted, PeerLost, PotluckError

logger = logging.getLogger(__name__)

Reason = Literal["stop", "length"]

MOST_WAIT_S = 30.0  # that a caller is told to wait before it tries again


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
    stopped_by: str | None = None


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer."""

    text: str
    probs: tuple[TokenProb, ...]
    ending: Ending


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
        return self._cancelled.is_set()

    @property
    def outcome(self) -> str:
        """Why it ended, once it has."""
        if self.ending is not None:
            return self.ending.reason
        return "cancelled" if self.is_cancelled else "failed"

    @property
    def steps(self) -> Session | None:
        """Its session on the peers; None before the first step and after the last one. For any thread."""
        if self._model is None or self._session is None:
            return None
        return self._model.blocks.session_of(self._session.cache)

    @property
    def trace(self) -> Trace | None:
        """What became of its steps so far; None before the first one. For any thread."""
        session = self.steps
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


class Reply:
    """All answers to one request, as they come. Belongs to the event loop."""

    def __init__(self, answers: Sequence[Answer], said: asyncio.Queue[Said]) -> None:
        self.answers = tuple(answers)
        self._said = said
        self._ahead: list[Said] = []

    async def begun(self, timeout_s: float) -> None:
        """Returns when there is something to hear, or after so long.

        Raises:
            PotluckError: the first thing was that it failed.
        """
        if (first := await self._next(timeout_s)) is not None:
            if isinstance(first[1], Exception):
                raise first[1]
            self._ahead.append(first)

    async def heard(self, idle_s: float) -> AsyncIterator[tuple[int, Piece | Ending] | None]:
        """Pieces and endings, each with the number of its answer, until all have ended; None after silence of `idle_s`.

        Raises:
            PotluckError: the swarm could not answer.
        """
        left = len(self.answers)
        while left:
            said = self._ahead.pop() if self._ahead else await self._next(idle_s)
            if said is None:
                yield None
                continue
            index, what = said
            if isinstance(what, Exception):
                raise what
            left -= isinstance(what, Ending)
            yield index, what

    async def whole(self) -> list[Whole]:
        """All of all answers.

        Raises: as `heard`.
        """
        texts: list[list[Piece]] = [[] for _ in self.answers]
        endings: dict[int, Ending] = {}
        async for said in self.heard(math.inf):
            assert said is not None
            index, what = said
            if isinstance(what, Ending):
                endings[index] = what
            else:
                texts[index].append(what)
        return [
            Whole(
                "".join(piece.text for piece in pieces), tuple(p for piece in pieces for p in piece.probs), endings[i]
            )
            for i, pieces in enumerate(texts)
        ]

    def cancel(self) -> None:
        """Whatever is still under way ends now."""
        for answer in self.answers:
            if answer.ending is None:
                answer.cancel()

    async def _next(self, timeout_s: float) -> Said | None:
        try:
            async with asyncio.timeout(timeout_s if timeout_s < math.inf else None):
                return await self._said.get()
        except TimeoutError:
            return None


class Answers:
    """All answers under way. Belongs to the event loop.

    Args:
        parallel: answers that are generated at the same time, at most.
        queue: answers that may wait besides.
        when_over: told of each answer when its thread is free again.

    Attributes:
        open: answers that wait or are generated.
    """

    def __init__(
        self, model: SwarmModel, prompts: Prompts, *, parallel: int, queue: int, when_over: Callable[[Answer], None]
    ) -> None:
        self.open: set[Answer] = set()
        self._model = model
        self._prompts = prompts
        self._parallel = parallel
        self._most = parallel + queue
        self._when_over = when_over
        self._threads = ThreadPoolExecutor(parallel, "potluck-answer")

    @property
    def running(self) -> int:
        """Answers that have a thread."""
        return min(len(self.open), self._parallel)

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return len(self.open) - self.running

    def begin(self, orders: Sequence[Order]) -> Reply:
        """All of these answers, or none.

        Raises:
            Busy: too many are waiting.
        """
        if self.open and len(self.open) + len(orders) > self._most:
            raise Busy(f"{self.waiting} answers are waiting already; try again later", retry_after_s=self._wait_s())
        said: asyncio.Queue[Said] = asyncio.Queue()
        answers = [Answer(order, index, said, self._over) for index, order in enumerate(orders)]
        self.open.update(answers)
        for answer in answers:
            answer.future = self._threads.submit(self._generate, answer)
        return Reply(answers, said)

    async def close(self) -> None:
        """Cancels what is under way, and waits for the threads."""
        for answer in list(self.open):
            answer.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def _over(self, answer: Answer) -> None:
        self.open.discard(answer)
        self._when_over(answer)

    def _wait_s(self) -> float:
        """When to try again: the oldest answers have been at it for so long, and new ones will take as long."""
        now_s = time.monotonic()
        return min(MOST_WAIT_S, max(now_s - answer.timing.asked_s for answer in self.open))

    # ------------------------------------------------------------------ in the threads

    def _generate(self, answer: Answer) -> None:
        """The whole life of an answer in its thread."""
        order = answer.order
        try:
            with self._model.session(len(order.ids) + order.max_tokens if order.reserves else 0) as session:
                answer.attach(self._model, session)
                if answer.is_cancelled:
                    return
                follower = Follower(answer, self._prompts)
                try:
                    follower = self._checked(answer, follower)
                finally:
                    answer.last_trace = trace = answer.trace
                    if trace is not None:
                        answer.reroutes = trace.reroutes
                        emit(trace)
                follower.end()
        except concurrent.futures.CancelledError:
            if not answer.is_cancelled:
                answer.say(PeerLost("the swarm's connection ended in the middle of an answer"))
        except PotluckError as error:
            answer.say(error)
        except Exception as error:
            logger.exception("an answer failed")
            answer.say(error)
        finally:
            answer.end()

    def _checked(self, answer: Answer, follower: Follower) -> Follower:
        """Has the answer made; once more, and by others, where peers lied in it and nobody has seen it yet."""
        try:
            self._run(answer.order, follower)
        except Doubted as doubt:
            if answer.order.in_pieces:
                first = max(0, doubt.position + 1 - len(answer.order.ids))
                what = f"the answer is wrong from its token {first} on: a peer lied; ask again, and others compute it"
                raise Doubted(what, position=doubt.position, peer_id=doubt.peer_id) from doubt
            answer.tokens = 0
            follower = Follower(answer, self._prompts)
            self._run(answer.order, follower)
        return follower

    def _run(self, order: Order, follower: Follower) -> None:
        model, prompts, sampling = self._model, self._prompts, order.sampling
        ids = torch.tensor([order.ids], device=model.device)
        chosen = [
            *((follower.probs,) if follower.probs is not None else ()),
            *processors(sampling, len(order.ids), model.device),
            *((order.guard(),) if order.guard is not None else ()),
            *choosers(sampling, model.device),
        ]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_config(order.max_tokens, prompts.ends),
            logits_processor=LogitsProcessorList(chosen),
            stopping_criteria=StoppingCriteriaList([follower]),
            corrects=False,  # what chooses tokens here, and hands them on, is made for one try
        )


def _config(max_tokens: int, ends: frozenset[int]) -> GenerationConfig:
    """Greedy, and nothing that the model's authors recommend besides: `client.api.sampling` sees to that."""
    eos = sorted(ends) or None
    config: GenerationConfig = cast(Any, GenerationConfig)(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=eos[0] if eos else 0,
        return_dict_in_generate=False,
    )
    return config


class Probabilities(LogitsProcessor):
    """Notes how likely the next token is, before anything changes the scores."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._logprobs: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._logprobs = torch.log_softmax(scores[0], dim=-1)
        return scores

    def of(self, token: int) -> TokenProb:
        """Of the token that was chosen by these scores."""
        assert self._logprobs is not None
        values, tokens = self._logprobs.topk(min(self._top, len(self._logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return TokenProb(token, float(self._logprobs[token]), top)


class Follower(StoppingCriteria):
    """Sees each token of an answer: makes text of it, and ends the answer where it must."""

    def __init__(self, answer: Answer, prompts: Prompts) -> None:
        order = answer.order
        self.probs = None if order.logprobs is None else Probabilities(order.logprobs)
        self._answer = answer
        self._text = Detokenizer(prompts.tokenizer, keeps_special=order.keeps_special)
        self._stops = Stops(order.stops)
        self._seen = len(order.ids)
        self._ends = prompts.ends
        self._ended = False  # by a token that means the end
        self._pieces: list[Piece] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for token in input_ids[0, self._seen :].tolist():
            self._take(token)
        self._seen = input_ids.shape[1]
        is_over = self._ended or self._stops.found is not None or self._answer.is_cancelled
        return torch.full((input_ids.shape[0],), is_over, dtype=torch.bool, device=input_ids.device)

    def _take(self, token: int) -> None:
        answer = self._answer
        answer.tokens += 1
        answer.timing.last_s = now_s = time.monotonic()
        answer.timing.first_s = answer.timing.first_s or now_s
        self._ended = token in self._ends
        if self._ended:
            return
        text = self._stops.add(self._text.add(token))
        probs = () if self.probs is None else (self.probs.of(token),)
        if text or probs:
            self._show(Piece(text, probs))

    def _show(self, piece: Piece) -> None:
        if self._answer.order.in_pieces:
            self._answer.say(piece)
        else:
            self._pieces.append(piece)

    def end(self) -> None:
        """The answer is complete, unless it was cancelled."""
        if self._answer.is_cancelled:
            return
        if self._stops.found is None:
            rest = self._stops.add(self._text.end()) + self._stops.end()
            if rest:
                self._show(Piece(rest))
        if self._pieces:
            probs = tuple(prob for piece in self._pieces for prob in piece.probs)
            self._answer.say(Piece("".join(piece.text for piece in self._pieces), probs))
        is_stopped = self._ended or self._stops.found is not None
        self._answer.say(Ending("stop" if is_stopped else "length", self._answer.tokens, self._stops.found))
