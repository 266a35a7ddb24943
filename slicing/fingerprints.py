"""What a model is, as short digests: the same on every machine that has the same files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from slicing.checkpoint import stored_tensors
from slicing.config import read_config

if TYPE_CHECKING:
    from torch import nn

    from slicing.source import ModelSource
    from slicing.span_model import SpanModel

_DIGEST_BYTES = 16

IRRELEVANT = frozenset(
    {
        # who wrote the file, and where
        "_name_or_path",
        "transformers_version",
        "architectures",
        "auto_map",
        # how a process runs the model, not what it computes
        "dtype",
        "torch_dtype",
        "use_cache",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
        "torchscript",
        # labels and prompts
        "id2label",
        "label2id",
        "finetuning_task",
        "problem_type",
        "task_specific_params",
        "tokenizer_class",
        "prefix",
    }
)
"""Fields of config.json that do not shape what the blocks compute."""


def fingerprint(source: ModelSource) -> str:
    """A digest of what the model computes with: 32 hex digits.

    It covers the fields of config.json that shape the computation, every tensor's name, shape and dtype (from file
    headers; no weights are read), and the commit of a hub model. Not covered: where the files lie, and the values of
    the weights, for which there are `block_digests`. A folder and a hub model are never the same.

    Raises:
        BrokenCheckpoint: files are missing or damaged.
        UnknownModel: the hub cannot be reached.
    """
    tensors = {name: [tensor.dtype, *tensor.shape] for name, tensor in stored_tensors(source).items()}
    described = {"config": _relevant(read_config(source)), "tensors": tensors, "revision": source.revision}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def block_digests(model: SpanModel, known: Mapping[int, str] | None = None) -> dict[int, str]:
    """A digest per loaded block of the weights that are really in memory, as 32 hex digits: {block: digest}.

    Weights loaded as another dtype have another digest.

    Args:
        known: digests of blocks that `model` took over from another one (`move_span`); not computed again.
    """
    known = known or {}
    unknown = {i: block for i, block in model.blocks.items() if i not in known}
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashlib lets others run meanwhile
        found = dict(zip(unknown, threads.map(_module_digest, unknown.values()), strict=True))
    return {i: known.get(i) or found[i] for i in model.blocks}


def _relevant(value: Any) -> Any:
    """`value` without irrelevant fields, at any depth: composite models nest configurations."""
    if isinstance(value, dict):
        return {key: _relevant(inner) for key, inner in value.items() if key not in IRRELEVANT}
    return value


def _module_digest(module: nn.Module) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
