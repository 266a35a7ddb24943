"""Steps of many sessions in one pass: tokens packed as [1, N, H], whatever sequence they belong to.

All that blocks do but attention treats tokens one by one, so a packed pass computes for each token what a pass of its
session alone would, and reads the weights once for all. Attention is the architecture's own function, called for each
sequence with its own keys, values and mask: the one function registered here takes the sequences apart.

Which architectures this is exact for is not known beforehand; `trouble` finds out by comparing with steps of single
sessions, which are the specification. Known to need them: ALiBi (its bias comes from the padding mask), running states
(a scan knows one sequence only), attention by chunks, and blocks with an attention of their own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from protocol.errors import ModelError
from slicing import rows
from slicing.cache import SpanCache
from slicing.config import n_blocks, text_config
from slicing.paged import PagedCache

if TYPE_CHECKING:
    from slicing.span_model import SpanModel

NAME: Final = "potluck_ragged"
"""Of the attention function. transformers makes masks only for those that it knows, so here it makes none."""
LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})

_pass = threading.local()
"""`packing`: of the packed pass that this thread runs now. Not an argument, since some blocks do not pass these on."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """The tokens of one session in a packed pass.

    Attributes:
        hidden: [1, q, H].
        start: how many tokens the session has before them: `cache.n_tokens`, and those of earlier passes of a step that
            is computed in pieces.
    """

    cache: PagedCache
    hidden: Tensor
    start: int

    @property
    def tokens(self) -> int:
        return self.hidden.shape[-2]


class RaggedSpan:
    """Packed passes through a loaded span. For the thread that runs the span's other steps.

    Raises:
        ModelError: the architecture cannot be packed; the message says why.
    """

    def __init__(self, model: SpanModel) -> None:
        self._model = model
        self._windows = _windows(model)
        self._configs = _attention_configs(model)
        self._plain = {id(config): config._attn_implementation for config in self._configs}
        if not model.takes_positions:
            raise ModelError("its decoder takes no positions")
        if model.streams or model.extras:
            raise ModelError("its blocks need more than hidden states")
        AttentionInterface.register(NAME, _attention)

    def check(self, stretch: Stretch) -> None:
        """Raise unless the stretch fits the model: so that it cannot fail a pass that others share.

        Raises:
            BadMessage: a shape, dtype, span or number of tokens that does not fit.
        """
        self._model.check_stretch(stretch.cache.span, stretch.hidden, stretch.start)

    def run(self, stretches: Sequence[Stretch]) -> list[Tensor]:
        """One pass of checked stretches of different sessions, all over the same blocks and of one dtype.

        Caches have the new tokens, but have not seen them: `advance` is the caller's business. So where this raises,
        every cache is as it was.

        Returns:
            hidden states after the span, [1, q, H] each.
        """
        model, (span,) = self._model, {stretch.cache.span for stretch in stretches}
        parts = [stretch.hidden.to(model.device) for stretch in stretches]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        positions = torch.cat([torch.arange(s.start, s.start + s.tokens, device=model.device) for s in stretches])
        with torch.inference_mode(), self._packed(stretches), rows.shared(len(stretches) > 1):
            output = model.run_decoder(span, hidden, {"position_ids": positions[None]}, use_cache=False)
        return list(torch.split(output, [stretch.tokens for stretch in stretches], dim=-2))

    def unpacked(self, cache: PagedCache) -> SpanCache:
        """The same session's cache for steps of its own: of several rows, say, or with padding."""
        single = self._model.new_cache(cache.span)
        if cache.n_tokens:
            with torch.inference_mode():
                for block in range(cache.span.start, cache.span.stop):
                    keys, values = cache.read(block)
                    cast(Any, single.layers[block]).update(keys[None].clone(), values[None].clone())
            single.advance(1, cache.n_tokens)
        return single

    @contextmanager
    def _packed(self, stretches: Sequence[Stretch]) -> Iterator[None]:
        _pass.packing = _Packing(tuple(stretches), self._windows, self._plain)
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config in self._configs:
                config._attn_implementation_internal = self._plain[id(config)]
            del _pass.packing


def _windows(model: SpanModel) -> dict[int, int | None]:
    """How many tokens each block of the model attends to; None: all."""
    others = set(getattr(text_config(model.config), "layer_types", None) or ()) - LAYER_TYPES
    if others:
        raise ModelError(f"it has blocks of other kinds: {', '.join(sorted(others))}")
    layers: list[Any] = list(DynamicCache(config=model.config).layers)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        raise ModelError("its blocks keep more than keys and values")
    windows = [layer.sliding_window if layer.is_sliding else None for layer in layers]
    return dict(enumerate(windows or [None] * n_blocks(model.config)))


def _attention_configs(model: SpanModel) -> list[Any]:
    """All configurations by which the span's modules choose their attention function."""
    modules = [module for block in model.blocks.values() for module in block.modules()]
    found = [getattr(module, "config", None) for module in (model.model, *model.model.modules(), *modules)]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}
    return list(configs.values())


# ---------------------------------------------------------------------- attention, one sequence after the other


@dataclass(slots=True, eq=False)
class _Packing:
    """What attention needs to know of a packed pass."""

    stretches: tuple[Stretch, ...]
    windows: dict[int, int | None]
    plain: dict[int, str]  # attention functions of single steps, by id of the configuration
    masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict)

    def mask(self, start: int, tokens: int, window: int | None, implementation: str, like: Tensor) -> Tensor | None:
        """What transformers would make for a single step: [1, 1, q, k], additive for its eager functions, of booleans
        for sdpa, and none where the function needs none, or makes its own."""
        seen = start if window is None else min(start, window - 1)
        in_sight = window is None or seen + tokens < window
        if implementation not in ("eager", "sdpa"):
            return None
        if implementation == "sdpa" and in_sight and (tokens == 1 or start == 0):
            return None
        key = (start, tokens, window)
        if key not in self.masks:
            queries = torch.arange(seen, seen + tokens, device=like.device)[:, None]
            keys = torch.arange(seen + tokens, device=like.device)[None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            if implementation == "eager":
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)
            self.masks[key] = mask[None, None]
        return self.masks[key]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, heads, N, d_k], key [1, kv_heads, N, d_k], value [1, kv_heads, N, d_v] -> [1, N, heads, d_v]."""
    packing: _Packing = _pass.packing
    if kwargs.get("position_bias") is not None:
        raise ModelError("its attention has a bias for each sequence")
    block = cast(int, module.layer_idx)
    window, (implementation, attend) = packing.windows[block], _plain_attention(module, packing)
    outputs: list[Tensor] = []
    offset = 0
    for stretch in packing.stretches:
        here = slice(offset, offset + stretch.tokens)
        keys, values = stretch.cache.write(block, stretch.start, key[0, :, here], value[0, :, here])
        if window is not None:
            first = max(0, stretch.start - window + 1)
            keys, values = keys[:, first:], values[:, first:]
        mask = packing.mask(stretch.start, stretch.tokens, window, implementation, query)
        outputs.append(attend(module, query[:, :, here], keys[None], values[None], mask, **kwargs)[0])
        offset = here.stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _plain_attention(module: nn.Module, packing: _Packing) -> tuple[str, Callable[..., Any]]:
    """The name of the attention function that the module uses in single steps, and the function."""
    implementation = packing.plain[id(module.config)]
    file = sys.modules[type(module).__module__]
    eager = getattr(file, "eager_attention_forward", None)
    return implementation, file.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
