"""Shapes: what the tensors of a step have to look like, for one model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.errors import BadMessage
from protocol.span import Span
from slicing.cache import SpanCache
from slicing.positions import Positions


@dataclass(frozen=True, slots=True)
class Shapes:
    """As `SpanModel` has the attributes of the same names.

    Attributes:
        positions: what the decoder knows of them.
        extra_width: of the extras' last dimension.
    """

    hidden_size: int
    streams: tuple[int, ...]
    n_blocks: int
    dtype: torch.dtype
    hidden_dtypes: Collection[torch.dtype]
    positions: Positions
    extras: frozenset[str]
    extra_width: int

    def check_step(
        self,
        hidden: Tensor,
        cache: SpanCache | None,
        part: Span,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        extras: Mapping[str, Tensor],
        grad: bool,
    ) -> None:
        """See `SpanModel.step`.

        Raises:
            BadMessage: a shape, dtype, position or span that does not fit the model or the cache.
        """
        fits = hidden.ndim == len(self.streams) + 3 and hidden.shape[:-3] == self.streams and 0 not in hidden.shape
        if not fits or hidden.shape[-1] != self.hidden_size or hidden.dtype not in self.hidden_dtypes:
            wanted = ", ".join(map(str, [*self.streams, "rows", "tokens", self.hidden_size]))
            raise BadMessage(
                f"hidden states must be [{wanted}] of {self.dtype}, not {tuple(hidden.shape)} of {hidden.dtype}"
            )
        batch, q = hidden.shape[-3], hidden.shape[-2]
        seen = 0
        if cache is not None:
            seen = cache.n_tokens
            _check_cache(cache, part, batch, grad)
        if attention_mask is not None:
            _check_mask(attention_mask, batch, seen + q)
        if position_ids is not None:
            self.positions.check(position_ids, batch, q)
        else:
            self.positions.check_length(seen + q)
        self._check_extras(extras, batch, q)

    def check_stretch(self, hidden: Tensor, start: int) -> None:
        """Can hidden states [1, q, H] follow `start` tokens in a pass that sessions share?

        Raises:
            BadMessage: a shape, dtype or number of tokens that does not fit.
        """
        if hidden.ndim != 3 or hidden.shape[0] != 1 or 0 in hidden.shape or hidden.shape[-1] != self.hidden_size:
            raise BadMessage(f"hidden states must be [1, tokens, {self.hidden_size}], not {tuple(hidden.shape)}")
        if hidden.dtype != self.dtype:
            raise BadMessage(f"hidden states must be {self.dtype}, not {hidden.dtype}")
        self.positions.check_length(start + hidden.shape[-2])

    def _check_extras(self, extras: Mapping[str, Tensor], batch: int, q: int) -> None:
        if extras.keys() != self.extras:
            raise BadMessage(f"a step needs the tensors {sorted(self.extras)} beside the hidden states")
        for name, tensor in extras.items():
            if tensor.ndim != 4 or tensor.shape[:3] != (batch, q, self.n_blocks) or tensor.dtype != self.dtype:
                raise BadMessage(f"{name} must be {(batch, q, self.n_blocks)} + one dimension, of {self.dtype}")
            if tensor.shape[3] != self.extra_width:
                raise BadMessage(f"{name} has the wrong width {tensor.shape[3]}")


def _check_cache(cache: SpanCache, part: Span, batch: int, grad: bool) -> None:
    if cache.span != part:
        raise BadMessage(f"the cache is of blocks {cache.span}, the step of {part}")
    if cache.batch not in (None, batch):
        raise BadMessage(f"the cache has {cache.batch} rows, the step {batch}")
    if grad:
        raise BadMessage("a step with a cache records nothing for autograd")


def _check_mask(attention_mask: Tensor, batch: int, tokens: int) -> None:
    if attention_mask.shape != (batch, tokens):
        raise BadMessage(f"attention mask must be {(batch, tokens)}, not {tuple(attention_mask.shape)}")
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise BadMessage(f"attention mask must be bool or whole numbers, not {attention_mask.dtype}")
