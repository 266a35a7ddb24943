"""Who guesses the tokens that come next: the text so far, or a small model on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer

from client.ngrams import Match, NgramIndex
from client.window import MODEL, Window, kind_of
from protocol.errors import ConfigError
from slicing import load_config, model_class, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from client.model import SwarmModel

DRAFT_DECAY = 0.9  # per drafted step, of the measured time per drafted token


class Drafter(Protocol):
    """Makes guesses for one answer."""

    def guess(self, ids: Tensor, window: Window, limit: int) -> list[int]:
        """At most `limit` tokens that may follow `ids`, int64 [1, n]; none where that would not pay."""

    def learn(self, window: Window, chosen: Sequence[int], guesses: int, right: int) -> None:
        """The step gave the tokens `chosen`: `right` of its guesses, and one more."""

    @property
    def draft_s(self) -> float:
        """What making one guess costs."""


class Lookup:
    """Guesses from the text so far. Where it makes none, it still learns whether one would have been right."""

    draft_s = 0.0

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._match: Match | None = None
        self._first = 0  # the first token after the match, guessed or not

    def guess(self, ids: Tensor, window: Window, limit: int) -> list[int]:
        self._index.extend(ids[0, len(self._index) :].tolist())
        self._match = match = self._index.match()
        if match is None:
            return []
        guesses = window.choose(kind_of(match.length), limit)
        tokens = self._index.continuation(match, max(1, guesses))
        self._first = tokens[0]
        return tokens[:guesses]

    def learn(self, window: Window, chosen: Sequence[int], guesses: int, right: int) -> None:
        if self._match is None:
            return
        if guesses == 0:
            right, guesses = int(chosen[0] == self._first), 1
        window.acceptance.note(kind_of(self._match.length), right, missed=right < guesses)


class Draft:
    """Guesses from a small model on this machine, with the same tokenizer; always its likeliest tokens.

    transformers' own drafter is not used: it is meant to be asked at every step, and follows the answer by counting.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._cached: list[int] = []  # the tokens in the cache
        self._draft_s: float | None = None

    @property
    def draft_s(self) -> float:
        return self._draft_s or 0.0

    def guess(self, ids: Tensor, window: Window, limit: int) -> list[int]:
        guesses = window.choose(MODEL, limit, self.draft_s)
        if guesses == 0:
            return []
        started_s = time.perf_counter()
        tokens = self._continue(ids[0].tolist(), guesses)
        each_s = (time.perf_counter() - started_s) / len(tokens)
        before_s = each_s if self._draft_s is None else self._draft_s
        self._draft_s = DRAFT_DECAY * before_s + (1 - DRAFT_DECAY) * each_s
        return tokens

    @torch.inference_mode()
    def _continue(self, text: list[int], count: int) -> list[int]:
        self._crop(min(_common_prefix(self._cached, text), len(text) - 1))
        fed, found = text[len(self._cached) :], []
        for _ in range(count):
            ids = torch.tensor([fed], device=self._model.device)
            logits = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True).logits
            self._cached += fed
            found.append(int(logits[0, -1].argmax()))
            fed = found[-1:]
        return found

    def _crop(self, kept: int) -> None:
        """Forgets what was guessed wrongly. What has run out of a window, or into a running state, is read again."""
        removed = len(self._cached) - kept
        if removed and all(type(layer) is DynamicLayer for layer in self._cache.layers):
            self._cache.crop(-removed)
            del self._cached[kept:]
        elif removed:
            self._cache, self._cached = DynamicCache(config=self._model.config), []

    def learn(self, window: Window, chosen: Sequence[int], guesses: int, right: int) -> None:
        if guesses:
            window.acceptance.note(MODEL, right, missed=right < guesses)
        else:
            window.acceptance.fade(MODEL)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def load_draft(name: str, model: SwarmModel) -> PreTrainedModel:
    """A whole model on this machine, to guess with.

    Raises:
        ConfigError: its tokens cannot be the model's, or its weights cannot be read.
    """
    source = resolve(name)
    config = load_config(source)
    ours, theirs = (c.get_text_config().vocab_size for c in (model.config, config))
    if ours != theirs:
        raise ConfigError(
            f"the draft model {source.name!r} has {theirs} tokens and {model.source.name!r} {ours}: use one with the"
            " same tokenizer"
        )
    kind = cast(Any, model_class(config))
    try:
        draft = kind.from_pretrained(
            source.location, revision=source.revision, dtype=torch.float32, use_safetensors=True
        )
    except OSError as error:
        raise ConfigError(f"the draft model {source.name!r} cannot be loaded: {error}") from error
    return cast("PreTrainedModel", draft.to(model.device).eval())


def is_plain_draft(model: PreTrainedModel) -> bool:
    """Does it need nothing but token ids? Some of transformers' assistants look into the model that they assist."""
    return isinstance(model, GenerationMixin) and not type(model).__name__.startswith("Gemma4")
