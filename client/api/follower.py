"""Sees each token of an answer as it is chosen: how likely it was, and what text it makes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from client.api.answer import Answer, Ending, Piece, TokenProb
from client.api.detokenizer import Detokenizer
from client.api.prompts import Prompts
from client.api.stops import Stops


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
        self._answer.say(Ending("stop" if is_stopped else "length", self._answer.tokens))
