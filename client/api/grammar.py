"""Answers that follow a JSON schema: tokens that cannot go on with it are forbidden, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from client.api.errors import BadRequest
from client.api.prompts import Prompts

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer may look like, for a tokenizer. For any number of answers."""

    tokenizer: llguidance.LLTokenizer
    text: str
    ends: frozenset[int]

    def begin(self) -> LogitsProcessor:
        """For one answer."""
        return Guard(llguidance.LLMatcher(self.tokenizer, self.text), self.ends)


class Grammars:
    """Makes grammars for one model. For any thread; reading the tokenizer takes a second, once."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._lock = threading.Lock()

    def of_schema(self, schema: Mapping[str, Any], *, param: str) -> Grammar:
        """Texts that are JSON of this schema.

        Raises:
            BadRequest: it is no schema, or one that cannot be followed; or the model's tokenizer cannot be used.
        """
        compact: JsonCompileOptions = {"whitespace_flexible": False}  # small models are fond of endless spaces
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
        except ValueError as error:
            raise BadRequest(
                f"this schema cannot be followed: {error}", param=param, reason="invalid_schema"
            ) from error
        return self.of_text(text, param=param)

    def of_text(self, text: str, *, param: str) -> Grammar:
        """Texts of a grammar in llguidance's language.

        Raises:
            BadRequest: as `of_schema`.
        """
        tokenizer = self._read(param)
        if complaint := llguidance.LLMatcher.validate_grammar(text, tokenizer):
            raise BadRequest(
                f"this schema cannot be followed: {_first_line(complaint)}", param=param, reason="invalid_schema"
            )
        return Grammar(tokenizer, text, self._prompts.ends)

    def _read(self, param: str) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                theirs = self._prompts.tokenizer
                if not isinstance(theirs, PreTrainedTokenizerFast) or not self._prompts.ends:
                    raise BadRequest("this model's tokenizer cannot follow a schema", param=param)
                self._tokenizer = llguidance.hf.from_tokenizer(theirs, eos_token=sorted(self._prompts.ends))
            return self._tokenizer


class Guard(LogitsProcessor):
    """Allows only tokens that go on with the grammar; its end, where the text may end."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = sorted(ends)
        self._seen: int | None = None  # tokens of prompt and answer; the prompt's are no matter of the grammar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._seen is not None:
            self._matcher.consume_tokens(input_ids[0, self._seen :].tolist())
        self._seen = input_ids.shape[1]
        allowed = self._allowed(scores.shape[-1]).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)

    def _allowed(self, vocabulary: int) -> Tensor:
        """bool [vocabulary]."""
        allowed = np.zeros(vocabulary, dtype=bool)
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self._matcher.get_error()}")
        if self._matcher.is_stopped():
            allowed[self._ends] = True
            return torch.from_numpy(allowed)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        known = min(vocabulary, len(bits))
        allowed[:known] = bits[:known]
        return torch.from_numpy(allowed)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
