"""How the next token of an answer is chosen: penalties, bias, temperature and cuts, then a draw.

All of it is transformers' kind of processor, the draw too: it leaves the drawn token alone with a finite score, and
`generate` decodes greedily. So each answer draws from a generator of its own, whatever others are under way.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from client.api.schemas import Common
from client.text import LEAST_TEMPERATURE

MOST_SEED = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The numbers of one answer. `temperature` (as good as) 0: always the likeliest token. `top_k` 0: of all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    def nth(self, index: int) -> Sampling:
        """For one of several answers to the same request."""
        return replace(self, seed=(self.seed + index) % MOST_SEED)


def sampling_of(request: Common, model: GenerationConfig) -> Sampling:
    """What a request asks for; where it does not say, what the model's authors recommend, or else what OpenAI does."""
    recommended: Mapping[str, Any] = model.to_diff_dict()
    # A model that says in so many words that it does not sample is asked for its likeliest tokens.
    usual: dict[str, Any] = {
        "temperature": 0.0 if model.do_sample is False else 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
    }
    if model.do_sample:
        usual |= {name: recommended[name] for name in usual if recommended.get(name) is not None}
    chosen = {name: usual[name] if (value := getattr(request, name)) is None else value for name in usual}
    repetition = request.repetition_penalty or recommended.get("repetition_penalty") or 1.0
    return Sampling(
        **chosen,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        logit_bias=tuple((request.logit_bias or {}).items()),
        seed=random.randrange(MOST_SEED) if request.seed is None else request.seed % MOST_SEED,
    )


def processors(sampling: Sampling, prompt_tokens: int, device: torch.device) -> list[LogitsProcessor]:
    """Before anything that forbids tokens: penalties and bias."""
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(Penalties(sampling.presence_penalty, sampling.frequency_penalty, prompt_tokens))
    if sampling.logit_bias:
        found.append(Bias(dict(sampling.logit_bias), device))
    return found


def choosers(sampling: Sampling, device: torch.device) -> list[LogitsProcessor]:
    """After it: the draw, and what makes it less or more daring. None, where the likeliest token is wanted."""
    if sampling.temperature < LEAST_TEMPERATURE:
        return []
    found: list[LogitsProcessor] = []
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return [*found, Draw(sampling.seed, device)]


class Penalties(LogitsProcessor):
    """OpenAI's: each token of the answer so far costs its next use `presence` once and `frequency` per use."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        return scores - self._presence * (counts > 0) - self._frequency * counts


class Bias(LogitsProcessor):
    """Adds to the scores of some tokens."""

    def __init__(self, bias: Mapping[int, float], device: torch.device) -> None:
        self._tokens = torch.tensor(list(bias), device=device)
        self._bias = torch.tensor(list(bias.values()), device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[0, self._tokens] += self._bias
        return scores


class Draw(LogitsProcessor):
    """Draws a token, and leaves no other."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
