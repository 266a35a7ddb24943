"""Chains of blocks, right and broken: which blocks run, in which order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

Order = tuple[int, ...]

IGNORED = -100  # label of a position that is neither trained nor judged


def broken_chains(n_blocks: int) -> dict[str, Order]:
    """Each way to break a chain at one block or at two neighbours, by name: leave out, swap, repeat."""
    right = tuple(range(n_blocks))
    chains: dict[str, Order] = {}
    for i in right:
        chains[f"skip {i}"] = right[:i] + right[i + 1 :]
        chains[f"repeat {i}"] = right[: i + 1] + right[i:]
    for i in right[:-1]:
        pair = (i, i + 1)
        chains[f"skip {i},{i + 1}"] = right[:i] + right[i + 2 :]
        chains[f"swap {i},{i + 1}"] = (*right[:i], *pair[::-1], *right[i + 2 :])
        chains[f"repeat {i},{i + 1}"] = (*right[: i + 2], *pair, *right[i + 2 :])
    return chains


def shared_blocks(order: Order) -> int:
    """How many blocks a chain runs before it departs from the right one."""
    return next(i for i in range(len(order) + 1) if order[i : i + 1] != (i,))


def run_chain(model: LlamaForCausalLM, states: Tensor, order: Order) -> Iterator[Tensor]:
    """Runs blocks over states [rows, length, hidden]; yields the states after each. Padding must stand on the right."""
    rotary = model.model.rotary_emb(states, torch.arange(states.shape[1], device=states.device)[None])
    for i in order:
        states = model.model.layers[i](states, attention_mask=None, position_embeddings=rotary)
        yield states
