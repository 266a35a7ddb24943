"""Requests become orders: what each of their answers is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from client.api.answer import Order
from client.api.errors import BadRequest
from client.api.gateway import Gateway
from client.api.grammar import Grammar
from client.api.prompts import Ids, Prompts
from client.api.sampling import sampling_of
from client.api.schemas import Common, Tool, ToolChoice
from client.api.tools import forced


def orders_of(
    gateway: Gateway,
    request: Common,
    ids: Ids,
    *,
    n: int = 1,
    most_tokens: int | None,
    usual_tokens: int | None = None,
    logprobs: int | None = None,
    keeps_special: bool = False,
    guard: Grammar | None = None,
    prompt_param: str = "messages",
) -> list[Order]:
    """`n` orders for one prompt.

    Args:
        most_tokens: that the request allows; None: it does not say.
        usual_tokens: where it does not; None: as the model's authors or the server's operator say.

    Raises:
        BadRequest: prompt and answer do not fit the model.
    """
    usual = usual_tokens or _recommended(gateway.model.generation_config) or gateway.config.answer_tokens
    first = Order(
        ids=ids,
        max_tokens=gateway.prompts.room(ids, most_tokens, usual, param=prompt_param),
        sampling=sampling_of(request, gateway.model.generation_config),
        reserves=most_tokens is not None,
        stops=request.stops,
        logprobs=logprobs,
        keeps_special=keeps_special,
        guard=None if guard is None else guard.begin,
        in_pieces=request.stream,
    )
    return [replace(first, sampling=first.sampling.nth(index)) for index in range(n)]


def tools_of(prompts: Prompts, tools: list[Tool] | None, choice: str | ToolChoice | None) -> tuple[Tool, ...]:
    """The tools that the model is told of.

    Raises:
        BadRequest: its chat template knows no tools, or the chosen one is not among them.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return ()
    if choice == "none":
        return ()
    if not prompts.takes_tools:
        raise BadRequest("this model's chat template knows no tools", param="tools", reason="unsupported_parameter")
    if isinstance(choice, ToolChoice):
        chosen = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not chosen:
            raise BadRequest(f"there is no tool {choice.function.name!r}", param="tool_choice")
        return chosen
    return tuple(tools)


def guard_of(
    gateway: Gateway,
    tools: Sequence[Tool],
    choice: str | ToolChoice | None,
    schema: Mapping[str, Any] | None,
    *,
    param: str,
) -> Grammar | None:
    """What the answer may look like: a call, where one of the tools must be called, or JSON of the schema.

    Raises:
        BadRequest: that cannot be had.
    """
    if tools and choice not in (None, "auto"):
        template = gateway.prompts.tokenizer.chat_template
        return gateway.grammars.of_text(forced(template, tools), param="tool_choice")
    return None if schema is None else gateway.grammars.of_schema(schema, param=param)


def _recommended(generation: Any) -> int | None:
    """The longest answer that the model's authors recommend, if they do."""
    return generation.max_new_tokens if isinstance(generation.max_new_tokens, int) else None
