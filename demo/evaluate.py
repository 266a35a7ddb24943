"""How well a model answers: exact match, per task, and through broken chains.

An answer is right if it is right in every token, end token included. Teacher forcing decides that in one forward pass:
greedy generation gives exactly the right answer if and only if, after each right prefix, the most likely token is the
right one (`tests/demo` checks it against `generate`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from demo.chains import IGNORED, Order, broken_chains, run_chain, shared_blocks
from demo.world import TASK_NAMES, Question, questions
from slicing.source import EMBEDDED

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = EMBEDDED / "potluck-demo"


@dataclass(frozen=True)
class Batch:
    """Questions with their answers, padded on the right: ids [rows, length], labels [rows, length].

    A label is the token that should follow at its position; `IGNORED` outside the answer.
    """

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Drop:
    """The accuracy of a broken chain, and the points (of 100) that it lost against the right one."""

    chain: str
    accuracy: float
    points: float


def load(folder: Path = MODEL) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The demo model in fp32, ready to answer, and its tokenizer."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def prompt(tokenizer: PreTrainedTokenizerFast, question: Question) -> str:
    """The question as the chat template shows it, up to where the answer begins."""
    message = {"role": "user", "content": question.text}
    return str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def batches(
    tokenizer: PreTrainedTokenizerFast, sample: Sequence[Question], batch_size: int, before: str = ""
) -> Iterator[Batch]:
    """The sample in batches, each question after the text `before` (earlier turns of a conversation)."""
    for start in range(0, len(sample), batch_size):
        pairs = []
        for question in sample[start : start + batch_size]:
            asked = tokenizer.encode(before + prompt(tokenizer, question))
            pairs.append((asked, tokenizer.encode(question.answer + str(tokenizer.eos_token))))
        length = max(len(asked) + len(answer) for asked, answer in pairs) - 1
        ids = torch.full((len(pairs), length), int(tokenizer.pad_token_id))
        labels = torch.full((len(pairs), length), IGNORED)
        for row, (asked, answer) in enumerate(pairs):
            both = torch.tensor(asked + answer)
            ids[row, : len(both) - 1] = both[:-1]
            labels[row, len(asked) - 1 : len(both) - 1] = both[len(asked) :]
        yield Batch(ids, labels)


def exact(model: LlamaForCausalLM, states: Tensor, labels: Tensor) -> Tensor:
    """Per row, whether every label is the most likely token: bool [rows], from the last block's states."""
    judged = labels != IGNORED
    right = model.lm_head(model.model.norm(states[judged])).argmax(-1) == labels[judged]
    wrong = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    wrong.index_add_(0, judged.nonzero()[:, 0], (~right).long())
    return wrong == 0


@torch.inference_mode()
def right_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sequence[Question],
    batch_size: int = 64,
    before: str = "",
) -> list[bool]:
    """For each question, whether greedy decoding gives exactly its answer."""
    order = tuple(range(len(model.model.layers)))
    found: list[bool] = []
    for batch in batches(tokenizer, sample, batch_size, before):
        *_, states = run_chain(model, model.model.embed_tokens(batch.ids), order)
        found += exact(model, states, batch.labels).tolist()
    return found


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sequence[Question],
    batch_size: int = 64,
    before: str = "",
) -> dict[str, float]:
    """The share of exact answers per task, and of all questions as `overall`."""
    right = right_answers(model, tokenizer, sample, batch_size, before)
    shares = {"overall": sum(right) / len(right)}
    for task in TASK_NAMES:
        of_task = [hit for hit, question in zip(right, sample, strict=True) if question.task == task]
        if of_task:
            shares[task] = sum(of_task) / len(of_task)
    return shares


@torch.inference_mode()
def drops(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sample: Sequence[Question],
    batch_size: int = 64,
    names: Collection[str] | None = None,
) -> list[Drop]:
    """The accuracy of each broken chain (of those named, or of all) on the sample, and its drop.

    What comes before a break is computed once for all chains.
    """
    n_blocks = len(model.model.layers)
    right = tuple(range(n_blocks))
    chains = {name: order for name, order in broken_chains(n_blocks).items() if names is None or name in names}
    hits = dict.fromkeys(chains, 0)
    hits_right = 0
    for batch in batches(tokenizer, sample, batch_size):
        embedded = model.model.embed_tokens(batch.ids)
        trace = [embedded, *run_chain(model, embedded, right)]
        hits_right += int(exact(model, trace[-1], batch.labels).sum())
        for name, order in chains.items():
            shared = shared_blocks(order)
            states = [trace[shared], *run_chain(model, trace[shared], order[shared:])][-1]
            hits[name] += int(exact(model, states, batch.labels).sum())
    return [Drop(name, hit / len(sample), 100 * (hits_right - hit) / len(sample)) for name, hit in hits.items()]


@contextmanager
def with_chain(model: LlamaForCausalLM, order: Order) -> Iterator[LlamaForCausalLM]:
    """The model with its blocks run in this order, cached generation included, for as long as the context lasts.

    A block that runs twice is there twice, sharing weights: each place of the chain has a cache slot of its own.
    """
    blocks, depth = model.model.layers, model.config.num_hidden_layers
    places = nn.ModuleList(_placed(blocks[i], place) for place, i in enumerate(order))
    model.model.layers, model.config.num_hidden_layers = places, len(order)
    layer_types = getattr(model.config, "layer_types", None)
    if layer_types is not None:
        model.config.layer_types = [layer_types[0]] * len(order)
    try:
        yield model
    finally:
        model.model.layers, model.config.num_hidden_layers = blocks, depth
        if layer_types is not None:
            model.config.layer_types = layer_types


def _placed(block: nn.Module, place: int) -> nn.Module:
    """A copy of the block that caches at another place; the weights are the same tensors."""
    twin = copy(block)
    twin._modules = dict(block._modules)
    attention = copy(block.get_submodule("self_attn"))
    attention.__dict__["layer_idx"] = place
    twin._modules["self_attn"] = attention
    return twin


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What `evaluate` measured: shares per task, points lost per way of breaking the chain."""

    questions: int
    held_out: dict[str, float]
    seen: dict[str, float]  # phrasings and operands of the training split
    conversation: dict[str, float]  # held out, each after three earlier turns
    broken_questions: int
    drops: tuple[Drop, ...]

    def markdown(self) -> str:
        """The measured tables of `docs/demo-model.md` and of the model card."""
        per_task = self.questions // len(TASK_NAMES)
        lines = [
            "| task | questions | held out [%] | seen [%] | held out, 4th turn [%] |",
            "|---|---:|---:|---:|---:|",
        ]
        for task in (*TASK_NAMES, "overall"):
            size = self.questions if task == "overall" else per_task
            shares = (self.held_out[task], self.seen[task], self.conversation[task])
            lines.append(f"| {task} | {size} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
        lines += [
            "",
            "| broken chain | chains | smallest drop [points] | at | median drop [points] | best accuracy left [%] |",
            "|---|---:|---:|---|---:|---:|",
        ]
        for way in dict.fromkeys(_way(drop.chain) for drop in self.drops):
            of_way = sorted((drop for drop in self.drops if _way(drop.chain) == way), key=lambda drop: drop.points)
            least, middle = of_way[0], of_way[len(of_way) // 2]
            left = 100 * max(drop.accuracy for drop in of_way)
            where = least.chain.split()[1]
            lines.append(f"| {way} | {len(of_way)} | {least.points:.1f} | {where} | {middle.points:.1f} | {left:.1f} |")
        return "\n".join(lines)


def _way(chain: str) -> str:
    verb, _, where = chain.partition(" ")
    return f"{verb} two neighbours" if "," in where else f"{verb} one block"


def evaluate(folder: Path = MODEL, n: int = 2400, n_broken: int = 240, seed: int = 7) -> Report:
    """Examines a stored model on `n` questions of each kind, and each broken chain on `n_broken` held-out ones."""
    model, tokenizer = load(folder)
    held_out, seen = questions(seed, n, "held_out"), questions(seed, n, "train")
    eos = str(tokenizer.eos_token)
    before = "".join(prompt(tokenizer, q) + q.answer + eos for q in questions(seed + 1, 3, "held_out"))
    return Report(
        questions=n,
        held_out=accuracy(model, tokenizer, held_out),
        seen=accuracy(model, tokenizer, seen),
        conversation=accuracy(model, tokenizer, held_out, before=before),
        broken_questions=n_broken,
        drops=tuple(drops(model, tokenizer, questions(seed + 2, n_broken, "held_out"))),
    )
