"""Blocks: their weights in memory, read few at a time where they are made small, or shared by two models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from protocol.span import Span
from slicing.config import load_config, model_class, text_config
from slicing.cuts import check_architecture, check_span
from slicing.loading import LoadReport, Progress, is_out_of_memory, load
from slicing.quantized import Quantization, packed_objects, quantize, quantized_nbytes
from slicing.skeleton import (
    BlockStack,
    drop_all_but_blocks,
    find_block_stack,
    holed_class,
    meta_skeleton,
    punch_holes,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slicing.source import ModelSource

logger = logging.getLogger(__name__)

QUANTIZED_AT_ONCE_BYTES = 1 << 30
"""So much of the full-size weights is in memory while they are made small: a new skeleton for each costs a moment."""


def load_blocks(
    source: ModelSource,
    span: Span,
    read: Collection[int],
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantization: Quantization,
    progress: Progress | None,
) -> tuple[PreTrainedModel, BlockStack, LoadReport]:
    """The model with the blocks `read` of `span`, and holes for all others.

    Where layers are quantised, a few blocks are loaded and made small before the next are read. For the arguments and
    what it raises see `slicing.span_model.load_span`.
    """
    if quantization == "none":
        return _read_blocks(source, span, read, dtype, device, progress)
    model, stack, report = _read_blocks(source, span, (), dtype, device, progress)
    blocks = stack.blocks(model)
    sizes, kept_bytes = block_bytes(source, dtype), 0
    for group in _groups(sorted(read), sizes, QUANTIZED_AT_ONCE_BYTES):
        part, its_stack, its_report = _read_blocks(source, span, group, dtype, device, progress)
        for i in group:
            block = its_stack.blocks(part)[i]
            itemsize = cast(torch.dtype, model.config.dtype).itemsize
            kept_bytes += quantized_nbytes(block, quantization, itemsize)[1]
            _quantize(block, quantization, f"blocks {span} of {source.name}")
        for i, block in rebound({i: its_stack.blocks(part)[i] for i in group}, part, model.config).items():
            blocks[i] = block
        report = report.plus(its_report)
    total = sum(sizes[i] for i in read)
    logger.info(
        "%s of blocks %s: %.0f %% of the bytes of their weights stay in floating point",
        quantization,
        span,
        100 * kept_bytes / max(1, total),
    )
    return model, stack, report


def _quantize(block: nn.Module, quantization: Quantization, what: str) -> None:
    try:
        quantize(block, quantization)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"too little memory for {what}") from error
        raise


def _groups(blocks: Sequence[int], sizes: Sequence[int], nbytes: int) -> Iterator[list[int]]:
    """`blocks` in groups of at most `nbytes` together, or of one block that has more."""
    group: list[int] = []
    for i in blocks:
        if group and sum(sizes[j] for j in [*group, i]) > nbytes:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _read_blocks(
    source: ModelSource,
    span: Span,
    read: Collection[int],
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None,
) -> tuple[PreTrainedModel, BlockStack, LoadReport]:
    """As `load_blocks`, at full size."""
    config = load_config(source)
    check_architecture(config)
    cls = model_class(config)
    check_span(config, span)
    found: list[BlockStack] = []

    def hollow(model: PreTrainedModel) -> None:
        stack = find_block_stack(model)
        punch_holes(model, stack, read)
        drop_all_but_blocks(model, stack)
        found.append(stack)

    what = f"blocks {span} of {source.name}"
    model, report = load(holed_class(cls, hollow), config, source, what, dtype=dtype, device=device, progress=progress)
    return model, found[-1], report


def block_bytes(source: ModelSource, dtype: torch.dtype | None, quantization: Quantization = "none") -> tuple[int, ...]:
    """Memory of each block's weights, in bytes, when they are loaded as `dtype` (None: as the configuration says) and
    quantised.

    Read off the skeleton; neither the weights nor their headers are needed.

    Raises:
        NoBlockStack, RemoteCodeRefused, ModelError: the architecture cannot be sliced.
    """
    config = load_config(source)
    check_architecture(config)
    skeleton = meta_skeleton(model_class(config), config)
    wanted = dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
    return tuple(
        quantized_nbytes(block, quantization, wanted.itemsize)[0]
        for block in find_block_stack(skeleton).blocks(skeleton)
    )


def rebound(blocks: Mapping[int, nn.Module], model: PreTrainedModel, config: PreTrainedConfig) -> dict[int, nn.Module]:
    """Copies of blocks of `model` that share its tensors and refer to the configuration of another."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo |= packed_objects(model)
    memo |= {id(model.config): config, id(text_config(model.config)): text_config(config)}
    return copy.deepcopy(dict(blocks), memo)
