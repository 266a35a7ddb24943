"""What `generate` is asked for where a model that is spread is compared with the unsplit one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IDS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
PADDED = {"inputs": IDS.masked_fill(MASK == 0, 0), "attention_mask": MASK}
SINGLE = {"inputs": IDS[:1]}
REPETITIVE = {"inputs": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])}

COMMON: dict[str, dict[str, Any]] = {
    "sampling": {
        **PADDED,
        "max_new_tokens": 20,
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.9,
        "temperature": 0.8,
        "repetition_penalty": 1.2,
    },
    "several sequences": {**SINGLE, "max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3},
    "beams": {**PADDED, "max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "beam sampling": {**PADDED, "max_new_tokens": 12, "num_beams": 3, "do_sample": True},
    "prompt lookup": {**REPETITIVE, "max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 4},
}
"""Those that every way of spreading a model is tried in."""


def each(models: Sequence[Any], **arguments: Any) -> list[Any]:
    """What the models generate, from the same seed."""
    results = []
    for model in models:
        torch.manual_seed(7)
        results.append(model.generate(**arguments))
    return results


def bad_draft(vocabulary: int) -> Any:
    """A draft model: most of what it proposes is taken back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model: Any = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model.eval()
