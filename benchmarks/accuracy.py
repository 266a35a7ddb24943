"""What compression costs in right answers: the demo model through three real peers. Writes `docs/accuracy.md`.

Paired: the same held-out questions go through the same chain with each codec. An answer is right if every token of it
is (see `demo.evaluate`); one forward pass through the swarm decides that for a whole batch. Also: the error that
each codec makes on the model's own activations, at every cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast, get_args

import torch
from torch import Tensor

from benchmarks.codecs import activation_errors
from client import SwarmModel, SwarmModelForCausalLM
from demo.chains import IGNORED
from demo.evaluate import batches, load, right_answers
from demo.swarm import MODEL, local_swarm, uneven_spans
from demo.world import questions
from slicing.quantized import Quantization, quantize

CODECS: Final = ("none", "bf16", "int8")
WEIGHTS: Final = ("float32", "bfloat16", "int8", "nf4")
QUESTIONS: Final = 2400
BATCH: Final = 60
SEED: Final = 11
ACTIVATION_QUESTIONS: Final = 200
DOC: Final = Path(__file__).parents[1] / "docs" / "accuracy.md"

INTRODUCTION: Final = """\
# What compression costs

This page is written by `python -m benchmarks run accuracy`: {n} held-out questions, put to `potluck-demo` through three
peers (blocks {spans}), once with each codec. A question counts only if every token of its answer is right. `lost` and
`won` count the questions that `none` answers and the codec does not, and the other way round.
"""

WEIGHTS_SECTION: Final = """\
## Smaller weights

The same questions, put to the unsplit model with its blocks as `--quantization` keeps them, or with all of it in
bfloat16 (`--dtype`); against float32.
"""

ACTIVATIONS: Final = """\
## Error on the model's own activations

Relative L2 error of a round trip of the hidden states of {n} questions, at every block where the model may be cut;
`peak` is their largest magnitude over their root mean square.
"""


def run() -> None:
    """Measure, print, write the page."""
    lines = [INTRODUCTION.format(n=QUESTIONS, spans=", ".join(map(str, uneven_spans())))]
    lines += ["| codec | right answers | against `none` | lost | won |", "|---|---|---|---|---|"]
    right = asyncio.run(_right_by_codec(CODECS))
    for name, hits in right.items():
        lines.append(_row(name, hits, right["none"]))
    lines += [
        "",
        WEIGHTS_SECTION,
        "| weights | right answers | against `float32` | lost | won |",
        "|---|---|---|---|---|",
    ]
    by_weights = {weights: _right_with(weights) for weights in WEIGHTS}
    lines += [_row(name, hits, by_weights["float32"]) for name, hits in by_weights.items()]
    lines += ["", ACTIVATIONS.format(n=ACTIVATION_QUESTIONS), activation_errors(_activations())]
    page = "\n".join(lines) + "\n"
    DOC.write_text(page)
    print(page)


def _row(name: str, hits: Tensor, reference: Tensor) -> str:
    share, other = hits.float().mean().item(), reference.float().mean().item()
    lost, won = int((reference & ~hits).sum()), int((hits & ~reference).sum())
    return f"| `{name}` | {share:.2%} | {100 * (share - other):+.2f} points | {lost} | {won} |"


async def _right_by_codec(codecs: Sequence[str]) -> Mapping[str, Tensor]:
    """Per codec, which of the questions are answered exactly: bool [questions]."""
    async with local_swarm() as swarm:
        await swarm.start_bootstrap()
        await asyncio.gather(*(swarm.start_peer(span) for span in uneven_spans()))
        return {name: await asyncio.to_thread(_right, swarm.maddr, name) for name in codecs}


def _right(maddr: str, codec_name: str) -> Tensor:
    sample = questions(SEED, QUESTIONS, "held_out")
    _, tokenizer = load()
    with SwarmModelForCausalLM.from_pretrained(MODEL, join=[maddr], codec=codec_name) as model:
        found = [_exact(model, batch.ids, batch.labels) for batch in batches(tokenizer, sample, BATCH)]
        if len(model.chain) != len(uneven_spans()):
            raise RuntimeError(f"the answers went through {len(model.chain)} peers")
    return torch.cat(found)


@torch.inference_mode()
def _right_with(weights: str) -> Tensor:
    """With these weights, which of the questions are answered exactly: bool [questions]."""
    model, tokenizer = load()
    if weights in get_args(Quantization):
        quantize(model.model.layers, cast(Quantization, weights))
    else:
        model.to(getattr(torch, weights))
    return torch.tensor(right_answers(model, tokenizer, questions(SEED, QUESTIONS, "held_out"), BATCH))


@torch.inference_mode()
def _exact(model: SwarmModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Per row, whether every label is the likeliest token: bool [rows], of int64 [rows, length] both."""
    logits = model(input_ids=ids, use_cache=False).logits
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(dim=1)


@torch.inference_mode()
def _activations() -> dict[int, Tensor]:
    """Hidden states before each block, and after the last: float32 [tokens, width], padding left out."""
    model, tokenizer = load()
    sample = questions(SEED, ACTIVATION_QUESTIONS, "held_out")
    found: dict[int, list[Tensor]] = {}
    for batch in batches(tokenizer, sample, BATCH):
        states = model(input_ids=batch.ids, use_cache=False, output_hidden_states=True).hidden_states
        kept = batch.ids != tokenizer.pad_token_id
        for cut, hidden in enumerate(states[:-1]):  # the last one is after the final norm, which no wire carries
            found.setdefault(cut, []).append(hidden[kept])
    return {cut: torch.cat(parts) for cut, parts in found.items()}
