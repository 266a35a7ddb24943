"""What the chaos suite and the soak ask, and what the answers must be: the embedded model's, in one process.

Only questions are asked whose answers do not hang on a hair: a replay rounds differently (law 1), and the 8-bit codec
more so. So logits are disturbed at random, by more than rounding does, and a question counts if its answer stays.
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
from tests.e2e.support import answers_at_length, unsplit

MODEL = "potluck-demo"
N_BLOCKS = 24
NEW_TOKENS = 32
TURNS = 4  # the last one is the question
TASKS = ("copying", "spelling", "sorting")  # of long answers

CODECS = ("none", "int8")
NOISE = 0.1
"""By how much logits may be off (at most, either way), so that the answer must still be the same."""
DISTURBED = 3  # answers with logits disturbed, all the same

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 50},
    "beams": {"do_sample": False, "num_beams": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "two rows": {"do_sample": True, "top_k": 50},
}


@dataclass(frozen=True)
class Case:
    """A question, how it is asked, and its answer.

    Attributes:
        ids, mask: int64 [rows, n], left-padded.
        expected: int64 [rows, n + NEW_TOKENS].
    """

    mode: str
    seed: int
    ids: Tensor
    mask: Tensor
    expected: Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        tensors = {"ids": self.ids, "mask": self.mask, "expected": self.expected}
        return {"mode": self.mode, "seed": self.seed} | {name: tensor.tolist() for name, tensor in tensors.items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Case:
        tensors = {name: torch.tensor(content[name]) for name in ("ids", "mask", "expected")}
        return cls(content["mode"], content["seed"], **tensors)


class Examiner:
    """Asks questions of the embedded model in this process."""

    def __init__(self) -> None:
        self._model = unsplit(MODEL)
        answers_at_length(self._model)
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(resolve(MODEL))

    def draw(self, rng: random.Random, mode: str) -> Case:
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
            asked = Case(mode, rng.randrange(2**32), encoded["input_ids"], encoded["attention_mask"], torch.empty(0))
            case = replace(asked, expected=ask(self._model, asked))
            noises = [Noise(rng.randrange(2**32)) for _ in range(DISTURBED)]
            if all(torch.equal(ask(self._model, case, noise), case.expected) for noise in noises):
                return case


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
    """Adds up to `NOISE` to each logit, either way."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + (torch.rand(scores.shape, generator=self._generator) * 2 - 1) * NOISE
