"""Requests become token ids: conversations through the model's chat template, texts as they are."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from client.api.errors import BadRequest
from client.api.schemas import Message, Tool
from client.api.tools import as_template_sees, knows_tools

Ids = tuple[int, ...]


class Prompts:
    """The tokenizer, for any thread.

    Args:
        vocabulary: how many tokens the model knows.
        ends: tokens that end an answer.
        context: tokens of prompt and answer together that the model can take; None: not known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, context: int | None, ends: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.context = context
        self._vocabulary = vocabulary
        self._lock = threading.Lock()  # tokenizers that encode in two threads at once complain of being borrowed

    @property
    def takes_tools(self) -> bool:
        """Does the model's chat template tell it of tools?"""
        return knows_tools(self.tokenizer.chat_template)

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, param: str = "messages") -> Ids:
        """A conversation, ending where the answer begins. Without a chat template: the messages' bare texts.

        Raises:
            BadRequest: the template refuses the conversation, or there are no tokens.
        """
        if self.tokenizer.chat_template is None:
            return self.of_text("\n".join(message.text for message in messages), param=param)
        told: dict[str, Any] = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools else {}
        try:
            with self._lock:
                encoding: Any = self.tokenizer.apply_chat_template(
                    [as_template_sees(message) for message in messages],
                    add_generation_prompt=True,
                    return_dict=True,
                    **told,
                )
        except (TemplateError, TypeError, KeyError) as error:  # templates look into messages without asking
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param=param) from error
        return self._checked(encoding["input_ids"], param)

    def of_text(self, text: str, *, param: str = "prompt") -> Ids:
        """A text.

        Raises:
            BadRequest: it has no tokens.
        """
        with self._lock:
            encoding: Any = self.tokenizer(text)
        return self._checked(encoding["input_ids"], param)

    def of_ids(self, ids: Sequence[int], *, param: str = "prompt") -> Ids:
        """Tokens that the caller made itself.

        Raises:
            BadRequest: the model knows no such tokens.
        """
        if too_large := [token for token in ids if not 0 <= token < self._vocabulary]:
            raise BadRequest(f"the model has {self._vocabulary} tokens; {too_large[0]} is none of them", param=param)
        return self._checked(ids, param)

    def room(self, ids: Ids, wanted: int | None, usual: int, *, param: str) -> int:
        """How many tokens an answer may have.

        Args:
            wanted: by the request; None: it does not say.
            usual: where it does not say.

        Raises:
            BadRequest: prompt and answer do not fit the model.
        """
        if self.context is None:
            return wanted or usual
        left = self.context - len(ids)
        if left < 1 or (wanted is not None and wanted > left):
            asked = f" and {wanted} of the answer" if wanted is not None else ""
            raise BadRequest(
                f"this model takes {self.context} tokens, and {len(ids)} of the prompt{asked} are more",
                param=param,
                reason="context_length_exceeded",
            )
        return wanted or min(usual, left)

    def token_text(self, token: int) -> str:
        """One token by itself, as it is shown beside its probability."""
        return str(self.tokenizer.decode([token]))

    def _checked(self, ids: Sequence[int], param: str) -> Ids:
        if not ids:
            raise BadRequest("the prompt is empty", param=param)
        return tuple(ids)


def ends_of(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a model's answers."""
    ends: Any = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, list) else (ends,))


def context_of(config: Any) -> int | None:
    """Tokens that a model of this (text) configuration can take; None: it does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
