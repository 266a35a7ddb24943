"""Extras: tensors that some architectures need in every block beside the hidden states. They come from the client."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slicing.config import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PER_LAYER_INPUTS = "per_layer_inputs"


def extras_of(decoder: nn.Module, parameters: Collection[str], config: PreTrainedConfig) -> frozenset[str]:
    """Their names.

    Args:
        parameters: of the decoder's forward.
    """
    needed = (
        PER_LAYER_INPUTS in parameters
        and hasattr(decoder, "project_per_layer_inputs")
        and bool(width_of_extras(config))
    )
    return frozenset({PER_LAYER_INPUTS} if needed else ())


def width_of_extras(config: PreTrainedConfig) -> int:
    """Of each block's part, per token; 0: there are none."""
    return getattr(text_config(config), "hidden_size_per_layer_input", 0) or 0


def take_ready_made(decoder: nn.Module) -> None:
    """The decoder would compute them from embeddings, which a span does not have: it is to take them as they arrive."""
    setattr(decoder, "project_per_layer_inputs", _as_given)  # noqa: B010 (mypy forbids plain assignment)


def _as_given(
    inputs_embeds: Tensor, per_layer_inputs: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    return per_layer_inputs
