"""A tiny llama, for tests that need blocks to run and do not mind which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WIDTH = 64
"""Of its hidden states."""


def write_llama(folder: Path, n_blocks: int, **fields: Any) -> None:
    """A random one, float32, always of the same weights. `fields`: more of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=n_blocks,
        num_attention_heads=4,
        **fields,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
