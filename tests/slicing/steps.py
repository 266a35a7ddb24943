"""A prefill and eight decode steps through any model, with or without left padding: what must come out equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slicing.skeleton import forward_parameters

PROMPT, DECODED = 12, 8


@torch.no_grad()
def logits_of(model: Any, *, padded: bool, seed: int = 0) -> list[Tensor]:
    """The logits of each step at the positions that count: [tokens, vocabulary].

    `model` is called as `generate` would call it: with position ids where it takes them, and its cache handed on.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (2, PROMPT + DECODED), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes_positions = "position_ids" in forward_parameters(model)
    cache: dict[str, Any] = {}
    found = []
    for start, stop in [(0, PROMPT)] + [(i, i + 1) for i in range(PROMPT, PROMPT + DECODED)]:
        inputs: dict[str, Any] = {"input_ids": ids[:, start:stop]}
        # These multiply the mask with the new tokens only, so that generate drops it after the prefill.
        if model.config.model_type not in ("mamba", "falcon_mamba") or start == 0:
            inputs["attention_mask"] = mask[:, :stop]
        if takes_positions:
            inputs["position_ids"] = positions[:, start:stop]
        output = model(**inputs, use_cache=True, **cache)
        name = "cache_params" if "cache_params" in output else "past_key_values"
        cache = {name: output[name]}
        found.append(output.logits[mask[:, start:stop].bool()])
    return found


def assert_same_bits(expected: list[Tensor], found: list[Tensor]) -> None:
    """Every step bit-identical."""
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), f"step {step}: off by {(a - b).abs().max().item():.1e}"
