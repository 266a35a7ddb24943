"""`POST /v1/responses`, without a memory: each request brings its whole conversation, and nothing is kept."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from client.api.answer import Ending, Order, Piece, TokenProb
from client.api.delivery import beats, deliver, prob_json
from client.api.errors import body_of
from client.api.gateway import Gateway
from client.api.orders import guard_of, orders_of, tools_of
from client.api.reply import Reply, Whole
from client.api.schemas import ResponseRequest, Tool
from client.api.streaming import KEEP_ALIVE, event
from client.api.tools import Call, ToolText, taken_apart
from protocol.errors import PotluckError

LOGPROBS = "message.output_text.logprobs"


async def respond(gateway: Gateway, request: Request, body: ResponseRequest) -> Response:
    """Answers a conversation.

    Raises:
        PotluckError: it cannot be answered.
        ReaderGone: nobody waits for the answer any more.
    """
    gateway.check(body)
    tools = tools_of(gateway.prompts, body.chat_tools, body.chat_choice)
    order = await asyncio.to_thread(_order, gateway, body, tools)
    reply = gateway.answers.begin([order])
    return await deliver(gateway, request, body, reply, _Response(gateway, body, reply, tools))


def _order(gateway: Gateway, body: ResponseRequest, tools: tuple[Tool, ...]) -> Order:
    ids = gateway.prompts.of_messages(body.messages, tools, param="input")
    schema = body.text.format.schema_wanted
    wants_probs = LOGPROBS in (body.include or ())
    (order,) = orders_of(
        gateway,
        body,
        ids,
        most_tokens=body.max_output_tokens,
        logprobs=body.top_logprobs or 0 if wants_probs else None,
        keeps_special=bool(tools),
        guard=guard_of(gateway, tools, body.chat_choice, schema, param="text.format"),
        prompt_param="input",
    )
    return order


@dataclass(slots=True)
class _Response:
    """One request's answer, as OpenAI's Responses API writes it."""

    gateway: Gateway
    body: ResponseRequest
    reply: Reply
    tools: tuple[Tool, ...]
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    item_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """See `Speaker`."""
        (whole,) = wholes
        text, calls = taken_apart(whole.text, self.tools)
        items = self._items(text, whole.probs, calls, whole.ending)
        return self._response(_status(whole.ending), items, whole.ending)

    async def events(self) -> AsyncGenerator[bytes]:
        """See `Speaker`."""
        config, body = self.gateway.config, self.body
        tracer = self.gateway.tracer(body, self.reply.answers)
        taker = ToolText(self.tools) if self.tools else None
        text = ""
        probs: list[TokenProb] = []
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        try:
            async for beat in beats(self.reply, tracer, config.keep_alive_s):
                if beat.trace is not None:
                    yield event({"type": "potluck.trace", "sequence_number": next(self.numbers), **beat.trace})
                if beat.said is None:
                    if beat.trace is None:
                        yield KEEP_ALIVE
                    continue
                _, what = beat.said
                if isinstance(what, Piece):
                    piece = what.text if taker is None else taker.add(what.text)
                    for each in self._piece(piece, what.probs, is_first=not text and not probs):
                        yield each
                    text += piece
                    probs += what.probs
                    continue
                rest, calls = ("", ()) if taker is None else taker.end()
                for each in self._piece(rest, (), is_first=not text and not probs):
                    yield each
                text += rest
                for each in self._end(text, tuple(probs), calls, what):
                    yield each
        except PotluckError as error:
            failure = {"code": "server_error", "message": body_of(error)["error"]["message"]}
            yield self._event("response.failed", response=self._response("failed") | {"error": failure})

    # ------------------------------------------------------------------ its events

    def _piece(self, text: str, probs: Sequence[TokenProb], *, is_first: bool) -> Iterator[bytes]:
        """More of the text; before the first one, that there will be some."""
        if not text and not probs:
            return
        if is_first:
            yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
            part = _text_part("", ())
            yield self._event("response.content_part.added", **self._place, part=part)
        logprobs = self._probs(probs)
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=logprobs)

    def _end(self, text: str, probs: Sequence[TokenProb], calls: Sequence[Call], ending: Ending) -> Iterator[bytes]:
        """All that is said at the end."""
        items = self._items(text, probs, calls, ending)
        if text or probs:
            logprobs = self._probs(probs)
            yield self._event("response.output_text.done", **self._place, text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", **self._place, part=items[0]["content"][0])
            yield self._event("response.output_item.done", output_index=0, item=items[0])
        elif not calls:  # an empty answer is one, too
            yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
            yield self._event("response.output_item.done", output_index=0, item=items[0])
        for index, item in enumerate(items):
            if item["type"] != "function_call":
                continue
            where = {"output_index": index, "item_id": item["id"]}
            begun = item | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event("response.function_call_arguments.delta", **where, delta=item["arguments"])
            said = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **where, **said)
            yield self._event("response.output_item.done", output_index=index, item=item)
        status = _status(ending)
        yield self._event(f"response.{status}", response=self._response(status, items, ending))

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self.numbers), **fields}, name=kind)

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    # ------------------------------------------------------------------ its objects

    def _items(
        self, text: str, probs: Sequence[TokenProb], calls: Sequence[Call], ending: Ending
    ) -> list[dict[str, Any]]:
        """What the answer is made of."""
        items: list[dict[str, Any]] = []
        if text or probs or not calls:
            part = _text_part(text, self._probs(probs))
            items.append(self._message(_status(ending), [part]))
        for call in calls:
            items.append(
                {
                    "id": f"fc_{secrets.token_hex(16)}",
                    "type": "function_call",
                    "status": "completed",
                    "call_id": call.id,
                    "name": call.name,
                    "arguments": call.arguments,
                }
            )
        return items

    def _message(self, status: str, content: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": [*content]}

    def _response(
        self, status: str, items: Sequence[dict[str, Any]] = (), ending: Ending | None = None
    ) -> dict[str, Any]:
        body, order = self.body, self.reply.answers[0].order
        usage = None
        if ending is not None:
            usage = {
                "input_tokens": len(order.ids),
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": ending.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": len(order.ids) + ending.tokens,
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.gateway.name,
            "output": [*items],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": order.sampling.temperature,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [_plain(tool) for tool in body.tools or ()],
            "top_p": order.sampling.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": body.metadata or {},
        }

    def _probs(self, probs: Sequence[TokenProb]) -> list[dict[str, Any]]:
        return [prob_json(prob, self.gateway.prompts.token_text) for prob in probs]


def _status(ending: Ending) -> str:
    return "completed" if ending.reason == "stop" else "incomplete"


def _text_part(text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(exclude_none=True)
