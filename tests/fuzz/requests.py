"""Bodies of requests to the gateway: through the real application, with a model that answers at once.

Allowed: HTTP answers below 500, and 503; each is JSON, in OpenAI's form where it is an error. What the thread of an
answer would do with a request, but for the model's own passes, is done too.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import GenerationConfig

from client.api.answer import Answer, Ending, Order, Piece, Said
from client.api.app import create_app
from client.api.config import ApiConfig
from client.api.detokenizer import Detokenizer
from client.api.gateway import open_gateway
from client.api.prompts import Prompts
from client.api.reply import Reply
from client.api.sampling import choosers, processors
from client.api.stops import Stops
from slicing import load_config, resolve
from tests.fuzz.target import Target

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MOST_ORDERS = 2  # of one request that are tried


class _Answers:
    """Answers each order with a few letters, after trying what its thread would."""

    def __init__(self, prompts: Prompts, vocabulary: int) -> None:
        self._prompts = prompts
        self._vocabulary = vocabulary

    def begin(self, orders: Sequence[Order]) -> Reply:
        said: asyncio.Queue[Said] = asyncio.Queue()
        answers = [Answer(order, index, said, lambda answer: None) for index, order in enumerate(orders)]
        for answer in answers[:MOST_ORDERS]:
            self._try(answer.order)
        for answer in answers:
            answer.say(Piece("abc"))
            answer.say(Ending("stop", 1))
        return Reply(answers, said)

    def _try(self, order: Order) -> None:
        device, ids = torch.device("cpu"), torch.tensor([[*order.ids, self._vocabulary - 1]])
        scores = torch.zeros(1, self._vocabulary)
        guard = [] if order.guard is None else [order.guard()]
        for processor in [
            *processors(order.sampling, len(order.ids), device),
            *guard,
            *choosers(order.sampling, device),
        ]:
            scores = cast(Any, processor)(ids[:, :-1] if processor in guard else ids, scores)
        assert not scores.isnan().any()
        stops = Stops(order.stops)
        stops.add(Detokenizer(self._prompts.tokenizer, keeps_special=order.keeps_special).add(17))
        stops.end()

    async def close(self) -> None:
        """Nothing is under way."""


@cache
def _app() -> Any:
    source = resolve("potluck-demo")
    config = load_config(source)
    model = SimpleNamespace(
        source=source,
        config=config,
        generation_config=GenerationConfig.from_pretrained(source.location),
        device=torch.device("cpu"),
        blocks=SimpleNamespace(fingerprint="f" * 32, n_blocks=24),
        swarm=SimpleNamespace(view=None),
    )
    gateway = open_gateway(cast(Any, model), ApiConfig())
    vocabulary = config.get_text_config().vocab_size
    return create_app(replace(gateway, answers=cast(Any, _Answers(gateway.prompts, vocabulary))))


_loop = asyncio.new_event_loop()


def run(data: bytes) -> None:
    """One request: its path by the first byte, the body is the rest."""
    if data:
        status, body = _loop.run_until_complete(_asked(PATHS[data[0] % len(PATHS)], data[1:]))
        assert status < 500 or status == 503, (status, body[:500])
        if status >= 400:
            assert json.loads(body)["error"]["message"]


async def _asked(path: str, body: bytes) -> tuple[int, bytes]:
    """As an HTTP server asks the application."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    answer: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await asyncio.sleep(60)  # the reader stays
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        answer.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await _app()(scope, receive, send)
    return answer[0]["status"], b"".join(message.get("body", b"") for message in answer)


def seeds() -> list[bytes]:
    """Requests that are answered, with most of what they may say."""
    for name in ("client.api", "uvicorn", "fastapi"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
    chats = [
        chat,
        chat | {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "stop": ["a", "b"], "n": 2},
        chat | {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2},
        chat | {"logit_bias": {"5": -100}, "frequency_penalty": 1, "presence_penalty": 1, "repetition_penalty": 1.2},
        chat | {"tools": [tool], "tool_choice": "auto"},
        chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}, *chat["messages"]]},
    ]
    completions = [{"prompt": "hello"}, {"prompt": [[1, 2], [3]], "echo": True}, {"prompt": [1, 2], "logprobs": 1}]
    responses = [
        {"input": "hello", "instructions": "be kind"},
        {"input": [{"role": "user", "content": "x"}], "text": {"format": {"type": "json_object"}}},
    ]
    for depth in (100, 250, 900):  # what is nested too deeply is refused as a whole, or taken
        deep: dict[str, Any] = {"type": "object"}
        for _ in range(depth):
            deep = {"type": "array", "items": deep}
        nested = tool | {"function": tool["function"] | {"parameters": deep}}  # type: ignore[operator]
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "[" * depth}}
        chats += [
            chat | {"tools": [nested], "tool_choice": "required"},
            chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}},
            {"messages": [*chat["messages"], {"role": "assistant", "tool_calls": [call]}]},
            chat | {"metadata": deep},
        ]
    bodies = [(0, body) for body in chats] + [(1, body) for body in completions] + [(2, body) for body in responses]
    return [bytes((kind,)) + json.dumps(body).encode() for kind, body in bodies]


TARGET = Target(
    "requests",
    run,
    seeds,
    modules=(
        "client.api.schemas",
        "client.api.prompts",
        "client.api.orders",
        "client.api.sampling",
        "client.api.grammar",
        "client.api.errors",
        "client.api.tools",
        "client.api.chat",
        "client.api.completions",
        "client.api.responses",
    ),
    short=150,
    cpu_s=2.0,
    longest=1 << 15,
)
