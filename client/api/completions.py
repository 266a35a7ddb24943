"""`POST /v1/completions`: texts go on as they are, without a chat template."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from client.api.answer import Ending, Order, TokenProb
from client.api.delivery import beats, deliver, finite, usage_of
from client.api.gateway import Gateway
from client.api.orders import orders_of
from client.api.reply import Reply, Whole
from client.api.schemas import CompletionRequest
from client.api.streaming import DONE, KEEP_ALIVE, event

USUAL_TOKENS = 16  # where a request does not say; as OpenAI's


async def complete(gateway: Gateway, request: Request, body: CompletionRequest) -> Response:
    """Goes on with each prompt.

    Raises:
        PotluckError: it cannot be answered.
        ReaderGone: nobody waits for the answer any more.
    """
    gateway.check(body)
    orders = await asyncio.to_thread(_orders, gateway, body)
    reply = gateway.answers.begin(orders)
    return await deliver(gateway, request, body, reply, _Completion(gateway, body, reply))


def _orders(gateway: Gateway, body: CompletionRequest) -> list[Order]:
    prompts, guard = gateway.prompts, None
    if (schema := body.response_format.schema_wanted) is not None:
        guard = gateway.grammars.of_schema(schema, param="response_format")
    found: list[Order] = []
    for prompt in body.prompts:
        ids = prompts.of_text(prompt) if isinstance(prompt, str) else prompts.of_ids(prompt)
        found += orders_of(
            gateway,
            body,
            ids,
            n=body.n,
            most_tokens=body.max_tokens,
            usual_tokens=USUAL_TOKENS,
            logprobs=body.logprobs,
            guard=guard,
            prompt_param="prompt",
        )
    return found


@dataclass(slots=True)
class _Completion:
    """One request's answers, as OpenAI writes them."""

    gateway: Gateway
    body: CompletionRequest
    reply: Reply
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
        """See `Speaker`."""
        choices = [
            {
                "text": self._echo(index) + whole.text,
                "index": index,
                "logprobs": self._logprobs(whole.probs, 0),
                "finish_reason": whole.ending.reason,
            }
            for index, whole in enumerate(wholes)
        ]
        return self._head() | {"choices": choices, "usage": self._usage([whole.ending for whole in wholes])}

    async def events(self) -> AsyncGenerator[bytes]:
        """See `Speaker`."""
        tracer = self.gateway.tracer(self.body, self.reply.answers)
        shown = [0 for _ in self.reply.answers]
        endings: list[Ending] = []
        if self.body.echo:
            for index in range(len(shown)):
                yield self._chunk(index, self._echo(index))
        async for beat in beats(self.reply, tracer, self.gateway.config.keep_alive_s):
            if beat.said is None:
                yield KEEP_ALIVE if beat.trace is None else self._chunk(0, "", trace=beat.trace)
                continue
            index, what = beat.said
            if isinstance(what, Ending):
                endings.append(what)
                yield self._chunk(index, "", reason=what.reason, trace=beat.trace)
            else:
                logprobs = self._logprobs(what.probs, shown[index])
                yield self._chunk(index, what.text, logprobs=logprobs, trace=beat.trace)
                shown[index] += len(what.text)
        if self._counts:
            yield event(self._head() | {"choices": [], "usage": self._usage(endings)})
        yield DONE

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        trace: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._head() | {"choices": [choice]}
        if self._counts:
            chunk["usage"] = None
        if trace is not None:
            chunk["potluck"] = trace
        return event(chunk)

    @property
    def _counts(self) -> bool:
        options = self.body.stream_options
        return options is not None and options.include_usage

    def _usage(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """Each prompt counts once, however many answers it has."""
        orders = [answer.order for answer in self.reply.answers]
        return usage_of(orders[:: self.body.n], endings)

    def _echo(self, index: int) -> str:
        """The prompt, where it is to be repeated."""
        if not self.body.echo:
            return ""
        prompt = self.body.prompts[index // self.body.n]
        return prompt if isinstance(prompt, str) else str(self.gateway.prompts.tokenizer.decode(prompt))

    def _head(self) -> dict[str, Any]:
        return self.gateway.head("text_completion", self.id, self.created)

    def _logprobs(self, probs: Sequence[TokenProb], offset: int) -> dict[str, Any] | None:
        """`offset`: characters of the answer before these tokens."""
        if self.body.logprobs is None:
            return None
        token_text = self.gateway.prompts.token_text
        tokens = [token_text(prob.token) for prob in probs]
        offsets = [offset + sum(len(token) for token in tokens[:i]) for i in range(len(tokens))]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(prob.logprob) for prob in probs],
            "top_logprobs": [{token_text(token): finite(value) for token, value in prob.top} for prob in probs],
            "text_offset": offsets,
        }
