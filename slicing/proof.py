"""Does a packed pass give what single steps give? A peer finds out when it starts, on its own weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from protocol.span import Span
from slicing.cache import CacheOp
from slicing.paged import PagedCache
from slicing.ragged import RaggedSpan, Stretch

if TYPE_CHECKING:
    from slicing.span_model import SpanModel

EXACT: Final = 1e-4
"""Of the largest value: how far a packed pass may be from single steps in float32, at any token."""
EXACT_ULPS: Final = 8.0
"""The same in coarser formats, in units of their precision, at most tokens: in these a rounding can send a token to
another expert."""
PREFILLS: Final = (7, 12, 3)  # tokens of three sessions
DECODED: Final = 3
SEED: Final = 20


def trouble(model: SpanModel) -> str:
    """Why steps of sessions over the span cannot be packed; "" if they can. Takes a few steps through a few blocks."""
    try:
        ragged = RaggedSpan(model)
        part = _one_of_each_kind(model)
        sequences = _sequences(model)
        error = _error(_packed(model, ragged, part, sequences), _single(model, part, sequences))
    except Exception as reason:  # noqa: BLE001  # code of any architecture, called in a way that it was not written for
        return f"{type(reason).__name__}: {reason}"
    # A comparison that is false for NaN, too.
    return "" if error <= 1.0 else f"packed steps differ from single ones, {error:.1f} times as much as they may"


def _one_of_each_kind(model: SpanModel) -> Span:
    """The shortest part of the span, from its start, with blocks of all its kinds."""
    kinds = {i: frozenset(type(module).__name__ for module in block.modules()) for i, block in model.blocks.items()}
    types = getattr(model.config.get_text_config(), "layer_types", None)
    wanted = {(kind, types and types[i]) for i, kind in kinds.items()}
    found = set()
    for i in range(model.span.start, model.span.stop):
        found.add((kinds[i], types and types[i]))
        if found == wanted and i + 1 in model.legal_cuts:
            return Span(model.span.start, i + 1)
    return model.span


def _sequences(model: SpanModel) -> list[Tensor]:
    """Hidden states of three sessions, [1, tokens, H]."""
    noise = torch.Generator().manual_seed(SEED)
    shapes = [(1, tokens + DECODED, model.hidden_size) for tokens in PREFILLS]
    return [torch.randn(shape, generator=noise).to(model.device, model.dtype) for shape in shapes]


def _single(model: SpanModel, part: Span, sequences: list[Tensor]) -> list[Tensor]:
    """Each session by itself: its prompt at once, then token by token."""
    outputs = []
    for hidden, prefill in zip(sequences, PREFILLS, strict=True):
        cache = model.new_cache(part)
        pieces = torch.split(hidden, [prefill, *[1] * DECODED], dim=-2)
        outputs.append(torch.cat([model.step(piece, cache) for piece in pieces], dim=-2))
    return outputs


def _packed(model: SpanModel, ragged: RaggedSpan, part: Span, sequences: list[Tensor]) -> list[Tensor]:
    """Together: prompts begin at different passes, one of them comes in pieces, one token is taken back and given
    again."""
    caches = [PagedCache(part) for _ in sequences]
    outputs = [torch.full_like(hidden, torch.nan) for hidden in sequences]
    half = PREFILLS[1] // 2
    passes = [
        {0: PREFILLS[0], 1: half},
        {0: 1, 1: PREFILLS[1] - half, 2: PREFILLS[2]},
        *[dict.fromkeys(range(len(sequences)), 1)] * DECODED,
    ]
    for wanted in passes:
        stretches = {
            i: Stretch(caches[i], sequences[i][:, start : start + tokens], start)
            for i, tokens in wanted.items()
            if (start := caches[i].n_tokens) < sequences[i].shape[-2]
        }
        for (i, stretch), output in zip(stretches.items(), ragged.run(list(stretches.values())), strict=True):
            outputs[i][:, stretch.start : stretch.start + stretch.tokens] = output
            caches[i].advance(stretch.tokens)
        if caches[2].n_tokens == PREFILLS[2] + 1 and wanted is passes[2]:
            caches[0].apply(CacheOp("crop", caches[0].n_tokens - 1))
    if any(not cache.holds(block) for cache in caches for block in range(part.start, part.stop)):
        raise RuntimeError("some blocks do not attend in the way that can be packed")
    return outputs


def _error(packed: list[Tensor], single: list[Tensor]) -> float:
    """How far the packed passes are from the single steps, 1 being as far as they may be."""
    found, wanted = (torch.cat(outputs, dim=-2)[0] for outputs in (packed, single))
    by_token = (found.double() - wanted.double()).abs().amax(dim=-1) / wanted.double().abs().max()
    if wanted.dtype == torch.float32:
        return float(by_token.max()) / EXACT
    return float(by_token.quantile(0.5)) / (EXACT_ULPS * torch.finfo(wanted.dtype).eps)
