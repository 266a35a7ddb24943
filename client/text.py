"""Text in, text out: tokenizer, chat template, streaming and stopping around a swarm model's `generate`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, TextStreamer

from client.model import SwarmModel
from protocol.errors import ConfigError
from slicing import ModelSource

Message = Mapping[str, str]  # {"role": "user", "content": "..."}

LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token comes in any case, and what scores are divided by is soon too small for their format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Greedy unless a temperature is given, of `LEAST_TEMPERATURE` at least.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ConfigError("--max-new-tokens and --num-beams must be at least 1")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError("--temperature must be >= 0, --top-p in (0, 1], --top-k >= 0")

    def arguments(self) -> dict[str, Any]:
        """Keywords of `generate`."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": self.temperature >= LEAST_TEMPERATURE,
        }
        if self.temperature >= LEAST_TEMPERATURE:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return arguments


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: the model brings none that can be used without running its code.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.location, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {source.name!r} has no usable tokenizer: {error}") from error
    return tokenizer


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Tensor:
    """Token ids, int64 [1, n], of a conversation, ending where the answer begins.

    A model without a chat template gets the messages' bare texts.
    """
    if tokenizer.chat_template is None:
        return encode_text(tokenizer, "\n".join(message["content"] for message in messages))
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return _ids(ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids, int64 [1, n], of a bare text.

    Raises:
        ConfigError: the text has no tokens.
    """
    ids = _ids(tokenizer(text, return_tensors="pt"))
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty")
    return ids


def _ids(encoding: Any) -> Tensor:
    ids: Tensor = encoding["input_ids"]
    return ids


class Stop(StoppingCriteria):
    """Ends an answer after the current token once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Writer(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def answer(
    model: SwarmModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    sampling: Sampling,
    write: Callable[[str], None],
    stop: threading.Event | None = None,
) -> str:
    """Generates one answer, writing it piece by piece as it comes (beam search: in one piece at the end).

    Returns:
        the whole answer, without special tokens.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    arguments = sampling.arguments()
    if sampling.num_beams == 1:
        arguments["streamer"] = _Writer(tokenizer, write)
    if stop is not None:
        arguments["stopping_criteria"] = StoppingCriteriaList([Stop(stop)])
    if model.generation_config.pad_token_id is None and tokenizer.eos_token_id is not None:
        arguments["pad_token_id"] = tokenizer.eos_token_id
    ids = input_ids.to(model.device)
    output: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    text = str(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
    if sampling.num_beams > 1:
        write(text)
    return text


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within this context Ctrl-C sets the event; a second one interrupts the hard way."""
    event = threading.Event()

    def interrupted(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
