"""The random models of the measurements, the same as those that Petals was measured with; written once to a cache."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

SEED: Final = 0
VOCABULARY: Final = 32_000
MAX_TOKENS: Final = 2048
SPREAD: Final = 1.5
"""Weights have the standard deviation SPREAD / sqrt(hidden): greedy answers are diverse then."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A llama with as many key and value heads as query heads, and a head of its own (not tied to the embeddings)."""

    hidden: int
    layers: int
    heads: int
    intermediate: int


SHAPES: Final = {
    "llama-small": Shape(hidden=1024, layers=16, heads=16, intermediate=2816),
    "llama-tiny": Shape(hidden=256, layers=8, heads=4, intermediate=688),
    # A device that waits instead of computing: see `benchmarks.emulated`.
    "llama-waits": Shape(hidden=32, layers=8, heads=2, intermediate=64),
}


def folder_of(name: str) -> Path:
    """The model's folder; it is made there first if need be (a few seconds, 1.1 GB for llama-small).

    `POTLUCK_BENCH_CACHE` names another place than the user's cache.
    """
    cache = Path(os.environ.get("POTLUCK_BENCH_CACHE") or platformdirs.user_cache_path("potluck")) / "benchmarks"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as place:
            made = Path(place, name)
            make(SHAPES[name], made)
            made.rename(folder)  # whole or not at all
    return folder


def with_tokenizer(name: str) -> Path:
    """The same model in a folder that has a tokenizer, too: each token is a word, `w0` to `w31999`."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = folder_of(name)
    folder = plain.with_name(f"{name}-words")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=plain.parent) as place:
            made = Path(place, folder.name)
            made.mkdir()
            for file in plain.iterdir():
                (made / file.name).symlink_to(file)
            words = {f"w{token}": token for token in range(VOCABULARY)}
            model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
            model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
            PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(made)
            made.rename(folder)
    return folder


def make(shape: Shape, folder: Path) -> None:
    """Writes the seeded model, float32, without a tokenizer. Its answers do not end by themselves."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=SPREAD / math.sqrt(shape.hidden),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder)
