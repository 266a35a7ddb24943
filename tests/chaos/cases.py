"""What the chaos suite and the soak ask, and what the answers must be: the embedded model's, in one process.

Where hidden states would cross the wire they are encoded and decoded, as the swarm does it. Only questions are asked
whose answers do not hang on a hair: a replay rounds differently (law 1), and a codec makes steps of what is a trifle.
So hidden states and logits are disturbed at random, by more than rounding does, and a question counts if its answer
stays the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from client.text import load_tokenizer
from demo.world import questions
from slicing import resolve
from tensor_codecs import codec
from tests.e2e.support import answers_at_length, unsplit

MODEL = "potluck-demo"
N_BLOCKS = 24
NEW_TOKENS = 32
TURNS = 4  # the last one is the question
TASKS = ("copying", "spelling", "sorting")  # of long answers

CODECS = ("none", "int8")
CUTS = (0, 8, 16)
"""The blocks before which hidden states cross the wire; they do so after the last one too."""
HIDDEN_NOISE = 1e-4  # relative; a hundred times what rounding does in float32
LOGITS_NOISE = 0.01
DISTURBED = 3  # answers with noise, which must all be the same

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "two rows": {"do_sample": True, "top_k": 50, "temperature": 1.5},
}


@dataclass(frozen=True)
class Case:
    """A question, how it is asked, and its answer.

    Attributes:
        ids, mask: int64 [rows, n], left-padded.
        expected: int64 [rows, n + NEW_TOKENS].
    """

    mode: str
    codec: str
    seed: int
    ids: Tensor
    mask: Tensor
    expected: Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        tensors = {"ids": self.ids, "mask": self.mask, "expected": self.expected}
        lists = {name: tensor.tolist() for name, tensor in tensors.items()}
        return {"mode": self.mode, "codec": self.codec, "seed": self.seed} | lists

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Case:
        tensors = {name: torch.tensor(content[name]) for name in ("ids", "mask", "expected")}
        return cls(content["mode"], content["codec"], content["seed"], **tensors)

    @property
    def name(self) -> str:
        return f"{self.mode}, {self.codec}"


class Examiner:
    """Asks questions of the embedded model in this process."""

    def __init__(self) -> None:
        self._model = unsplit(MODEL)
        answers_at_length(self._model)
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(resolve(MODEL))

    def draw(self, rng: random.Random, mode: str, codec_name: str) -> Case:
        """A question whose answer is sure."""
        while True:
            rows = 2 if mode == "two rows" else 1
            encoded: Any = self._tokenizer.apply_chat_template(
                [conversation(rng) for _ in range(rows)],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            asked = Case(mode, codec_name, rng.randrange(2**32), ids, mask, torch.empty(0))
            case = replace(asked, expected=self._answer(asked, None))
            if all(torch.equal(self._answer(case, rng.randrange(2**32)), case.expected) for _ in range(DISTURBED)):
                return case

    def _answer(self, case: Case, noise_seed: int | None) -> Tensor:
        """With hidden states as the wire would give them. A seed: with noise on them, and on logits."""
        noise = None if noise_seed is None else torch.Generator().manual_seed(noise_seed)
        on_the_wire = codec(case.codec)

        def cross(module: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *rest = args
            if noise is not None:
                hidden = hidden * (1 + HIDDEN_NOISE * uniform(hidden.shape, noise))
            return (on_the_wire.decode(on_the_wire.encode(hidden), hidden.shape, hidden.dtype, hidden.device), *rest)

        body = self._model.model
        hooks = [module.register_forward_pre_hook(cross) for module in (*(body.layers[i] for i in CUTS), body.norm)]
        try:
            return ask(self._model, case, *([] if noise is None else [Noise(noise)]))
        finally:
            for hook in hooks:
                hook.remove()


def ask(model: Any, case: Case, *processors: LogitsProcessor) -> Tensor:
    """The answer of the unsplit model or of a swarm's, int64 [rows, n + NEW_TOKENS]."""
    torch.manual_seed(case.seed)
    answer: Tensor = model.generate(
        case.ids,
        attention_mask=case.mask,
        max_new_tokens=NEW_TOKENS,
        logits_processor=LogitsProcessorList(processors),
        **MODES[case.mode],
    )
    return answer


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Some questions with their answers, and another question."""
    messages = []
    for _ in range(TURNS):
        (question,) = questions(rng.randrange(2**32), 1, "held_out", rng.choice(TASKS))
        messages.append({"role": "user", "content": question.text})
        messages.append({"role": "assistant", "content": question.answer})
    return messages[:-1]


class Noise(LogitsProcessor):
    """Adds up to `LOGITS_NOISE` to each logit, either way."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + LOGITS_NOISE * uniform(scores.shape, self._generator)


def uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Between -1 and 1."""
    return torch.rand(shape, generator=generator) * 2 - 1
