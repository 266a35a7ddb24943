"""Positions of tokens: which ones a model knows, and how a step may give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from protocol.errors import BadMessage
from slicing.config import text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Positions:
    """What a model's decoder knows of them.

    Attributes:
        table: the positions [low, high) that it has in a table; None where it computes them.
        has_axes: has a token several (text, height, width: mrope), so that position ids may have a dimension more?
    """

    table: tuple[int, int] | None
    has_axes: bool

    @classmethod
    def of(cls, model: PreTrainedModel, decoder: nn.Module) -> Positions:
        """Those of `model`, of which `decoder` is a part."""
        return cls(_table(decoder), _has_axes(model))

    def check(self, position_ids: Tensor, batch: int, q: int) -> None:
        """May a step of q tokens of `batch` rows stand there?

        Raises:
            BadMessage: of another shape or dtype, or outside the table.
        """
        dims = (2, 3) if self.has_axes else (2,)
        if position_ids.ndim not in dims or position_ids.shape[-1] != q or position_ids.shape[-2] not in (1, batch):
            raise BadMessage(f"position ids must be {(batch, q)}, not {tuple(position_ids.shape)}")
        if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
            raise BadMessage(f"position ids must be whole numbers, not {position_ids.dtype}")
        if self.table is not None:
            low, high = int(position_ids.min()), int(position_ids.max())
            # Outside a table a GPU does not raise, it aborts the process.
            if low < self.table[0] or high >= self.table[1]:
                raise BadMessage(f"position ids {low} to {high} lie outside the model's {self.table}")

    def check_length(self, tokens: int) -> None:
        """May a session have so many tokens per row?

        Raises:
            BadMessage: the table ends before.
        """
        if self.table is not None and tokens > self.table[1]:
            raise BadMessage(f"the model has positions up to {self.table[1]}, the session would need {tokens}")


def _has_axes(model: PreTrainedModel) -> bool:
    rope = getattr(text_config(model.config), "rope_parameters", None) or {}
    return "mrope_section" in rope or any(hasattr(module, "mrope_section") for module in model.modules())


def _table(decoder: nn.Module) -> tuple[int, int] | None:
    """Tables are learned (gpt2, opt: an Embedding of the decoder; opt's begins at -2) or made once (gptj, codegen)."""
    for child in decoder.children():
        if isinstance(child, nn.Embedding):
            offset = getattr(child, "offset", 0)
            return -offset, child.num_embeddings - offset
    for module in decoder.modules():
        made = getattr(module, "embed_positions", None)
        if isinstance(made, Tensor):
            return 0, made.shape[0]
    return None
