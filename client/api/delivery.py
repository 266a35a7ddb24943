"""How answers reach whoever asked: all at once or piece by piece. Where nobody reads any more, nobody computes."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from client.api.answer import Ending, Order, Piece, TokenProb
from client.api.gateway import Gateway, Tracer
from client.api.reply import Reply, Whole
from client.api.schemas import Common
from client.api.streaming import Stream, unless_gone

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this


class Speaker(Protocol):
    """One request's answers, as its endpoint writes them."""

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """All at once."""

    def events(self) -> AsyncGenerator[bytes]:
        """Piece by piece."""


async def deliver(gateway: Gateway, request: Request, body: Common, reply: Reply, speaker: Speaker) -> Response:
    """The response to a request. Where that fails, or its reader goes away, the answers end.

    A stream begins when there is something to say, or after a while: what goes wrong before has a status of its own.

    Raises:
        PotluckError: it cannot be answered.
        ReaderGone: nobody waits for the answer any more.
    """
    streams = False
    try:
        if not body.stream:
            return JSONResponse(speaker.whole(await unless_gone(request, reply.whole())))
        await unless_gone(request, reply.begun(0.0 if body.potluck.trace else gateway.config.keep_alive_s))
        streams = True
        return Stream(speaker.events(), reply.cancel)
    finally:
        if not streams:
            reply.cancel()


@dataclass(frozen=True, slots=True)
class Beat:
    """A moment of a stream: something was said, or the trace changed, or (neither) it was silent for too long."""

    said: tuple[int, Piece | Ending] | None = None
    trace: dict[str, Any] | None = None


async def beats(reply: Reply, tracer: Tracer | None, keep_alive_s: float) -> AsyncIterator[Beat]:
    """A stream's moments, until all answers have ended.

    Raises:
        PotluckError: the swarm could not answer.
    """
    look_s = keep_alive_s if tracer is None else min(tracer.every_s, keep_alive_s)
    silence_s = 0.0
    async for said in reply.heard(look_s):
        ends = said is not None and isinstance(said[1], Ending)
        trace = None if tracer is None else tracer.look(last=ends)
        silence_s = silence_s + look_s if said is None and trace is None else 0.0
        if said is not None or trace is not None or silence_s >= keep_alive_s:
            yield Beat(said, trace)
            silence_s = 0.0


def usage_of(orders: Sequence[Order], endings: Sequence[Ending]) -> dict[str, Any]:
    """How many tokens a request took; `orders`: one for each of its prompts."""
    prompt, completion = sum(len(order.ids) for order in orders), sum(ending.tokens for ending in endings)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def prob_json(prob: TokenProb, token_text: Callable[[int], str]) -> dict[str, Any]:
    """How likely a token was, and which others there were in its place."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

    return one(prob.token, prob.logprob) | {"top_logprobs": [one(*other) for other in prob.top]}


def finite(logprob: float) -> float:
    """As it can be written."""
    return max(logprob, LEAST_LOGPROB) if not math.isnan(logprob) else LEAST_LOGPROB
