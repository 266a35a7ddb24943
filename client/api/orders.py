"""Requests become orders: what each of their answers is to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from client.api import grammar
from client.api.answer import Order
from client.api.gateway import Gateway
from client.api.prompts import Ids
from client.api.sampling import sampling_of
from client.api.schemas import Common


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
    guard: grammar.Grammar | None = None,
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


def _recommended(generation: Any) -> int | None:
    """The longest answer that the model's authors recommend, if they do."""
    return generation.max_new_tokens if isinstance(generation.max_new_tokens, int) else None
