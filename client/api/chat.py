"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from client.api.answer import Ending, Order, TokenProb
from client.api.delivery import beats, deliver, prob_json, usage_of
from client.api.gateway import Gateway
from client.api.orders import guard_of, orders_of, tools_of
from client.api.reply import Reply, Whole
from client.api.schemas import ChatRequest, Tool
from client.api.streaming import DONE, KEEP_ALIVE, event
from client.api.tools import ToolText, taken_apart


async def chat(gateway: Gateway, request: Request, body: ChatRequest) -> Response:
    """Answers a conversation.

    Raises:
        PotluckError: it cannot be answered.
        ReaderGone: nobody waits for the answer any more.
    """
    gateway.check(body)
    tools = tools_of(gateway.prompts, body.tools, body.tool_choice)
    orders = await asyncio.to_thread(_orders, gateway, body, tools)
    reply = gateway.answers.begin(orders)
    return await deliver(gateway, request, body, reply, _Talk(gateway, body, reply, tools))


def _orders(gateway: Gateway, body: ChatRequest, tools: tuple[Tool, ...]) -> list[Order]:
    ids = gateway.prompts.of_messages(body.messages, tools)
    schema = body.response_format.schema_wanted
    return orders_of(
        gateway,
        body,
        ids,
        n=body.n,
        most_tokens=body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        keeps_special=bool(tools),
        guard=guard_of(gateway, tools, body.tool_choice, schema, param="response_format"),
    )


@dataclass(slots=True)
class _Talk:
    """One request's answers, as OpenAI writes them."""

    gateway: Gateway
    body: ChatRequest
    reply: Reply
    tools: tuple[Tool, ...]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """See `Speaker`."""
        choices = [self._choice(index, whole) for index, whole in enumerate(wholes)]
        usage = usage_of([self.reply.answers[0].order], [whole.ending for whole in wholes])
        return self._head("chat.completion") | {"choices": choices, "usage": usage}

    def _choice(self, index: int, whole: Whole) -> dict[str, Any]:
        reason: str = whole.ending.reason
        text, calls = taken_apart(whole.text, self.tools)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            reason = "tool_calls"
            message["content"] = text.strip() or None
            message["tool_calls"] = [call.as_json() for call in calls]
        logprobs = None if not self.body.logprobs else self._logprobs(whole.probs)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    async def events(self) -> AsyncGenerator[bytes]:
        """See `Speaker`."""
        tracer = self.gateway.tracer(self.body, self.reply.answers)
        takers = [ToolText(self.tools) if self.tools else None for _ in self.reply.answers]
        endings: list[Ending] = []
        for index in range(len(takers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for beat in beats(self.reply, tracer, self.gateway.config.keep_alive_s):
            if beat.said is None:
                yield KEEP_ALIVE if beat.trace is None else self._chunk(0, {}, trace=beat.trace)
                continue
            index, what = beat.said
            if isinstance(what, Ending):
                endings.append(what)
                for chunk in self._last(index, takers[index], what, beat.trace):
                    yield chunk
                continue
            taker = takers[index]
            text = what.text if taker is None else taker.add(what.text)
            if text or what.probs or beat.trace is not None:
                yield self._chunk(index, {"content": text}, probs=what.probs, trace=beat.trace)
        if self._counts:
            usage = usage_of([self.reply.answers[0].order], endings)
            yield event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage})
        yield DONE

    def _last(
        self, index: int, taker: ToolText | None, ending: Ending, trace: dict[str, Any] | None
    ) -> Iterator[bytes]:
        """The chunks that end an answer."""
        reason: str = ending.reason
        if taker is not None:
            rest, calls = taker.end()
            if rest:
                yield self._chunk(index, {"content": rest})
            if calls:
                reason = "tool_calls"
                yield self._chunk(index, {"tool_calls": [{"index": i, **c.as_json()} for i, c in enumerate(calls)]})
        yield self._chunk(index, {}, reason=reason, trace=trace)

    @property
    def _counts(self) -> bool:
        options = self.body.stream_options
        return options is not None and options.include_usage

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        probs: tuple[TokenProb, ...] = (),
        reason: str | None = None,
        trace: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(probs) if probs else None,
            "finish_reason": reason,
        }
        chunk = self._head("chat.completion.chunk") | {"choices": [choice]}
        if self._counts:
            chunk["usage"] = None
        if trace is not None:
            chunk["potluck"] = trace
        return event(chunk)

    def _head(self, kind: str) -> dict[str, Any]:
        return self.gateway.head(kind, self.id, self.created)

    def _logprobs(self, probs: Sequence[TokenProb]) -> dict[str, Any]:
        token_text = self.gateway.prompts.token_text
        return {"content": [prob_json(prob, token_text) for prob in probs], "refusal": None}
