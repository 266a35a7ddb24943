"""The recipe of `potluck-demo`: train 6 blocks, grow to 24, then train all of them to depend on their order.

Growth puts new blocks after each trained one, with output projections of zero: the function is unchanged. Blocks that
stay near the identity would hide a broken chain, so then some questions of each batch also run through chains with one
block or two neighbours left out, repeated or swapped, and the model is punished where those do not do clearly worse.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.chains import IGNORED, broken_chains, run_chain, shared_blocks
from demo.tokenizer import ASSISTANT, END, PAD, USER, build_tokenizer
from demo.world import Question, stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage of training; rates are those of its plateau."""

    steps: int
    tokens: int  # per step
    muon_lr: float
    adam_lr: float
    warmup: int  # steps
    final_lr: float  # the last step's rate, as a fraction of the plateau's
    decay: float  # the fraction of the steps, at the end, in which the rate falls
    broken_chains: int = 0  # broken chains per step
    broken_tokens: int = 0  # tokens of the batch that run through each of them
    broken_weight: float = 0.0  # of their loss, against that of the right chain
    zero_lr: float = 0.0  # Muon's rate for projections that start at zero
    idle_weight: float = 0.0  # of the loss of blocks that change too little
    least_change: float = 0.3  # that a block should make to the stream, as a fraction of its norm


@dataclass(frozen=True)
class Recipe:
    """All that the training depends on; the same recipe on the same machine gives the same model."""

    seed: int = 2026
    hidden_size: int = 128
    intermediate_size: int = 256
    heads: int = 4
    kv_heads: int = 2
    seed_blocks: int = 6  # blocks of the first stage
    blocks: int = 24
    max_positions: int = 2048
    windows: tuple[int, ...] = (128, 128, 128, 128, 128, 128, 128, 512)  # window lengths [tokens], step by step
    weight_decay: float = 0.02
    clip: float = 1.0
    margin: float = 1.5  # cross entropy [nats per token] that a broken chain should add to each answer
    small: Stage = Stage(steps=3400, tokens=4096, muon_lr=0.02, adam_lr=3e-3, warmup=100, final_lr=0.1, decay=0.3)
    grown: Stage = Stage(steps=400, tokens=3072, muon_lr=0.006, adam_lr=1e-3, warmup=30, final_lr=6 / 7, decay=0.25,
                         broken_chains=6, broken_tokens=256, broken_weight=0.7, zero_lr=0.04,
                         idle_weight=5.0)  # fmt: skip
    settled: Stage = Stage(steps=480, tokens=3072, muon_lr=0.006, adam_lr=1e-3, warmup=10, final_lr=0.0, decay=1.0,
                           broken_chains=6, broken_tokens=256, broken_weight=0.7,
                           idle_weight=5.0)  # fmt: skip
    threads: int = 2


# --- data -----------------------------------------------------------------------------------------------------------


def render(question: Question) -> str:
    """A question and its answer, as the chat template shows them."""
    return f"{USER}{question.text}{END}{ASSISTANT}{question.answer}{END}"


def windows(
    tokenizer: PreTrainedTokenizerFast, source: Iterator[Question], length: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Ids and labels [rows, length]: whole conversations, padded; labels are set at the tokens that predict answers."""
    pad, assistant = (tokenizer.get_vocab()[token] for token in (PAD, ASSISTANT))
    ids = torch.full((rows, length), pad)
    labels = torch.full((rows, length), IGNORED)
    row, at = 0, 0
    while True:
        batch = [next(source) for _ in range(rows)]
        for encoding in tokenizer.backend_tokenizer.encode_batch([render(question) for question in batch]):
            turn = encoding.ids
            if at + len(turn) > length:
                row, at = row + 1, 0
                if row == rows:
                    return ids, labels
            start = turn.index(assistant)
            ids[row, at : at + len(turn)] = torch.tensor(turn)
            labels[row, at + start : at + len(turn) - 1] = torch.tensor(turn[start + 1 :])
            at += len(turn)


def per_answer(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each answer [answers], from the losses [n] of all labelled positions of labels [rows, length]."""
    labelled = labels != IGNORED
    starts = labelled & ~functional.pad(labelled, (1, 0))[:, :-1]
    numbers = (starts.flatten().cumsum(0) - 1)[labelled.flatten()]
    sizes = torch.bincount(numbers)
    return torch.zeros(len(sizes)).index_add(0, numbers, losses) / sizes


# --- model ----------------------------------------------------------------------------------------------------------


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, blocks: int) -> LlamaForCausalLM:
    """A model with fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


@torch.no_grad()
def grow(small: LlamaForCausalLM, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The same function in more blocks: after each block of `small`, copies of it that add nothing to the stream yet.

    Only their output projections are zero: with fresh inner weights, too, they would take long to matter.
    """
    big = new_model(recipe, tokenizer, recipe.blocks)
    every = recipe.blocks // len(small.model.layers)
    for i, block in enumerate(big.model.layers):
        block.load_state_dict(small.model.layers[i // every].state_dict())
        if i % every:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    big.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    big.model.norm.load_state_dict(small.model.norm.state_dict())
    probe = torch.arange(min(len(tokenizer), 64))[None]
    if not torch.equal(small(probe).logits, big(probe).logits):
        raise AssertionError("growth changed the function")
    return big


def answer_losses(model: LlamaForCausalLM, states: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [n] at the labelled positions, from the last block's states."""
    labelled = labels != IGNORED
    logits = model.lm_head(model.model.norm(states[labelled]))
    return functional.cross_entropy(logits, labels[labelled], reduction="none")


# --- order sensitivity ----------------------------------------------------------------------------------------------


class Breaker:
    """Chooses broken chains, those more often that the model still answers well through."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.chains = list(broken_chains(recipe.blocks).values())
        self.shortfall = torch.full((len(self.chains),), recipe.margin)  # moving average of each chain's hinge loss
        self.recipe, self.stage = recipe, stage

    def state(self) -> tuple[float, float]:
        """The hinge loss of all broken chains, as last seen: its maximum and its mean."""
        return self.shortfall.max().item(), self.shortfall.mean().item()

    def loss(
        self, model: LlamaForCausalLM, trace: list[Tensor], labels: Tensor, right: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Mean hinge loss of the answers of a few broken chains, each run on some rows of the right chain's trace.

        `right` [n] are the right chain's losses. A broken chain should do worse than the right one by the margin: were
        it merely to do badly, then forgetting everything would be as good as depending on the order.
        """
        stage = self.stage
        chosen = torch.multinomial(self.shortfall + 0.02, stage.broken_chains, generator=rng).tolist()
        labelled = labels != IGNORED
        spread = torch.zeros(labels.shape).masked_scatter(labelled, right)
        size = max(1, stage.broken_tokens // labels.shape[1])
        losses = []
        for turn, which in enumerate(chosen):
            order = self.chains[which]
            # What comes before the break is what the right chain has computed anyway.
            shared = shared_blocks(order)
            rows = torch.arange(turn * size, (turn + 1) * size) % len(labels)
            *_, states = trace[shared][rows], *run_chain(model, trace[shared][rows], order[shared:])
            broken = per_answer(answer_losses(model, states, labels[rows]), labels[rows])
            whole = per_answer(spread[rows][labelled[rows]], labels[rows])
            loss = functional.relu(self.recipe.margin + whole - broken).mean()
            self.shortfall[which] += 0.3 * (min(loss.item(), self.recipe.margin) - self.shortfall[which])
            losses.append(loss)
        return torch.stack(losses).mean()


def idleness(trace: list[Tensor], labels: Tensor, least: float) -> Tensor:
    """How far the blocks fall short of changing the stream by `least` of its norm, where answers are predicted.

    At the start a new block changes nothing, so a chain without it is the right chain, and no loss tells them apart.
    """
    judged = labels != IGNORED
    squares = [functional.relu(least**2 - (b - a)[judged].square().sum() / a[judged].square().sum())
               for a, b in pairwise(trace)]  # fmt: skip
    return torch.stack(squares).mean() / least**2


# --- training -------------------------------------------------------------------------------------------------------


def optimizers(model: LlamaForCausalLM, recipe: Recipe, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms; each group keeps its full rate as `peak`."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    # Muon's steps have a fixed size: a projection that starts at zero has a longer way to go than a trained one.
    zero = [p for p in matrices if not p.any()]
    trained = [p for p in matrices if p.any()]
    muon_groups = [{"params": trained, "peak": stage.muon_lr}]
    if zero:
        muon_groups.append({"params": zero, "peak": stage.zero_lr})
    return [
        torch.optim.Muon(muon_groups, lr=stage.muon_lr, weight_decay=recipe.weight_decay, momentum=0.95),
        torch.optim.AdamW([{"params": rest, "peak": stage.adam_lr}], betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(stage: Stage, step: int) -> float:
    """The learning rate of a step, as a fraction of the stage's: warm up, stay, fall."""
    falling = stage.decay * stage.steps
    left = min(1.0, (stage.steps - step) / falling)
    return min(1.0, (step + 1) / stage.warmup) * (stage.final_lr + (1 - stage.final_lr) * left)


def run_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: Stage,
    source: Iterator[Question],
    folder: Path,
) -> None:
    """Trains the model in place, and saves it into `folder` now and then."""
    model.train()
    optims = optimizers(model, recipe, stage)
    breaker = Breaker(recipe, stage) if stage.broken_chains else None
    rng = torch.Generator().manual_seed(recipe.seed)
    order = tuple(range(len(model.model.layers)))
    right_sum, broken_sum, since = 0.0, 0.0, time.monotonic()
    for step in range(stage.steps):
        length = recipe.windows[step % len(recipe.windows)]
        ids, labels = windows(tokenizer, source, length, stage.tokens // length)
        embedded = model.model.embed_tokens(ids)
        trace = [embedded, *run_chain(model, embedded, order)]
        tokens = answer_losses(model, trace[-1], labels)
        loss = right = tokens.mean()
        broken = idle = torch.zeros(())
        if breaker:
            right = per_answer(tokens, labels).mean()  # short answers count as much as long ones
            broken = breaker.loss(model, trace, labels, tokens, rng)
            idle = idleness(trace, labels, stage.least_change)
            loss = right + stage.broken_weight * broken + stage.idle_weight * idle
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = group["peak"] * rate(stage, step)
            optim.step()
            optim.zero_grad()
        right_sum, broken_sum = right_sum + right.item(), broken_sum + broken.item()
        if (step + 1) % 25 == 0:
            worst, every = breaker.state() if breaker else (0.0, 0.0)
            log.info(
                "step %d/%d: loss %.4f, hinge of the broken chains run %.3f (all %.3f, worst %.2f), idle %.3f, %.2f s",
                step + 1, stage.steps, right_sum / 25, broken_sum / 25, every, worst, idle.item(),
                (time.monotonic() - since) / 25,
            )  # fmt: skip
            right_sum, broken_sum, since = 0.0, 0.0, time.monotonic()
        if (step + 1) % 100 == 0:
            save_model(model, tokenizer, folder)
    save_model(model, tokenizer, folder)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes model, tokenizer and chat template."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(recipe: Recipe, folder: Path, stages_folder: Path | None = None) -> LlamaForCausalLM:
    """Trains by the recipe into `folder`. Returns the model.

    Each stage is kept in `stages_folder`, by default beside `folder`; one that is finished there is not repeated.
    """
    work = stages_folder or folder.with_name(f"{folder.name}-stages")
    torch.set_num_threads(recipe.threads)
    tokenizer = build_tokenizer()
    begin = time.monotonic()
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, tokenizer, recipe.seed_blocks)
    stages = {"small": recipe.small, "grown": recipe.grown, "settled": recipe.settled}
    for number, (name, stage) in enumerate(stages.items()):
        if name == "grown":
            model = grow(model, recipe, tokenizer)
        if (work / name).exists():
            model = LlamaForCausalLM.from_pretrained(work / name, dtype=torch.float32)
            continue
        unfinished = work / f"{name}-unfinished"
        run_stage(model, tokenizer, recipe, stage, stream(recipe.seed + number, "train"), unfinished)
        unfinished.rename(work / name)
        log.info("stage %s finished after %.0f s", name, time.monotonic() - begin)
    save_model(model, tokenizer, folder)
    return model
