"""A span of a model's blocks, run by the architecture's own code."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from protocol.errors import BadMessage
from protocol.span import Span
from slicing.cache import SpanCache
from slicing.config import hidden_dtypes, hidden_size, load_config, model_class, n_blocks, text_config
from slicing.cuts import check_architecture, check_span, legal_cuts
from slicing.gates import Pass, gate
from slicing.loading import LoadReport, Progress, is_out_of_memory, load
from slicing.quantized import Quantization, packed_nbytes, packed_objects, quantize, quantized_nbytes
from slicing.skeleton import (
    BlockStack,
    drop_all_but_blocks,
    find_block_stack,
    forward_parameters,
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
EXTRAS = ("per_layer_inputs",)
"""Names of tensors that some architectures need in every block beside the hidden states; they come from the client."""


def load_span(
    source: ModelSource,
    span: Span,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    progress: Progress | None = None,
) -> SpanModel:
    """Load the blocks `span` of a model, and no other tensors than theirs and a few small shared ones.

    Args:
        dtype: of the weights; None: the model's own.
        quantization: of the blocks' linear layers (see `slicing/quantized.py`); `dtype` is then that of the rest, and
            of hidden states. Few blocks at a time are in memory at full size.
        progress: told as tensors are read.

    Raises:
        IllegalCut: the model cannot be cut there.
        NoBlockStack, RemoteCodeRefused, ModelError: the architecture cannot be sliced.
        BrokenCheckpoint: weights are missing or damaged.
        MemoryError: they do not fit into the memory of the machine or the device.
        UnknownModel: the hub cannot be reached.
    """
    blocks = range(span.start, span.stop)
    model, stack, report = _load_quantized(source, span, blocks, dtype, device, quantization, progress)
    return SpanModel(model, stack, span, report, quantization)


def move_span(old: SpanModel, source: ModelSource, span: Span, *, progress: Progress | None = None) -> SpanModel:
    """Load the blocks `span` of the model of which `old` holds others, but for those that `old` has in memory already.

    These are shared, not copied: `old` can go on in another thread, and what only it needs is free once it is gone.
    `dtype`, `device` and `quantization` stay; `report` counts what was read. The result computes the same bits as a
    fresh load of `span`.

    Raises:
        As `load_span`.
    """
    kept = old.span.overlap(span)
    read = [i for i in range(span.start, span.stop) if kept is None or i not in kept]
    model, stack, report = _load_quantized(source, span, read, old.dtype, old.device, old.quantization, progress)
    if kept is not None:
        blocks = stack.blocks(model)
        for i, block in old.copy_blocks(kept, model.config).items():
            blocks[i] = block
    return SpanModel(model, stack, span, report, old.quantization)


def _load_quantized(
    source: ModelSource,
    span: Span,
    read: Collection[int],
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantization: Quantization,
    progress: Progress | None,
) -> tuple[PreTrainedModel, BlockStack, LoadReport]:
    """As `_load_blocks`, and with quantised layers: a few blocks are loaded and made small before the next are read."""
    if quantization == "none":
        return _load_blocks(source, span, read, dtype, device, progress)
    model, stack, report = _load_blocks(source, span, (), dtype, device, progress)
    blocks = stack.blocks(model)
    sizes, kept_bytes = block_bytes(source, dtype), 0
    for group in _groups(sorted(read), sizes, QUANTIZED_AT_ONCE_BYTES):
        part, its_stack, its_report = _load_blocks(source, span, group, dtype, device, progress)
        for i in group:
            block = its_stack.blocks(part)[i]
            itemsize = cast(torch.dtype, model.config.dtype).itemsize
            kept_bytes += quantized_nbytes(block, quantization, itemsize)[1]
            _quantize(block, quantization, f"blocks {span} of {source.name}")
        for i, block in _rebound({i: its_stack.blocks(part)[i] for i in group}, part, model.config).items():
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


def _load_blocks(
    source: ModelSource,
    span: Span,
    read: Collection[int],
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None,
) -> tuple[PreTrainedModel, BlockStack, LoadReport]:
    """The model with the blocks `read` of `span`, and holes for all others; as `load_span`."""
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


class SpanModel:
    """The loaded blocks `span` of a model.

    A chain may use fewer blocks than are loaded: `step` and `new_cache` take the part to run. For one thread at a time.

    Attributes:
        span: the blocks that are loaded.
        config: the model's configuration.
        report: what was loaded.
        hidden_size: H, the width of hidden states.
        streams: the dimensions of hidden states before rows, tokens and H: none but in gemma3n, which has (4,).
        extras: names of the tensors that `step` needs beside the hidden states.
        legal_cuts: where a part of the span may begin and end.
        takes_positions: does the decoder take position ids?
        quantization: of the linear layers.
        dtype, device: of the weights that are not quantised, and of the hidden states that `step` takes and gives.
        hidden_dtypes: the same, and float32 where the architecture adds up hidden states in it (mamba, mamba2).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: BlockStack,
        span: Span,
        report: LoadReport,
        quantization: Quantization = "none",
    ) -> None:
        self.span = span
        self.report = report
        self.quantization = quantization
        # The weights keep requires_grad, as transformers leaves it: torch.matmul chooses kernels by it, under no_grad
        # too, so that jamba and mamba would round differently without.
        self.model = model
        self.config: PreTrainedConfig = model.config
        self.n_blocks = n_blocks(model.config)
        self.hidden_size = hidden_size(model.config)
        self.blocks = {i: stack.blocks(model)[i] for i in range(span.start, span.stop)}
        streams: int = getattr(text_config(model.config), "altup_num_inputs", 0)
        self.streams = (streams,) if streams else ()
        # Not that of a parameter: some architectures keep a few of them in float32, whatever the model is in.
        self.dtype = cast(torch.dtype, model.config.dtype)
        self.hidden_dtypes = hidden_dtypes(model.config)
        self._has_position_axes = _has_position_axes(model)
        first = self.blocks[span.start]  # without parameters where all its weights are quantised (olmo)
        self.device = next(chain(first.parameters(), first.buffers())).device
        self.legal_cuts = frozenset(legal_cuts(model.config))
        self._decoder = stack.decoder(model)
        self._parameters = forward_parameters(self._decoder)
        self.takes_positions = "position_ids" in self._parameters
        self._cache_name = "cache_params" if "cache_params" in self._parameters else "past_key_values"
        self._embedding_size = stack.embedding_size
        self._positions = _table_of_positions(self._decoder)
        self.extras = frozenset(name for name in EXTRAS if self._needs_extra(name))
        self._pass = Pass(returns_tuple=stack.returns_tuple)
        for i, block in self.blocks.items():
            # An attribute of the instance: the block's class, its name and its parameters stay what they are.
            setattr(block, "forward", gate(self._pass, i, block.forward))  # noqa: B010 (mypy forbids plain assignment)
        if self.extras:
            # The decoder would compute them from embeddings, which a span does not have; here they arrive ready-made.
            setattr(self._decoder, "project_per_layer_inputs", _given_per_layer_inputs)  # noqa: B010

    def new_cache(self, span: Span | None = None) -> SpanCache:
        """An empty cache for one session over `span` (default: all blocks loaded).

        Raises:
            BadMessage: the blocks are not all loaded, or the model cannot be cut there.
        """
        return SpanCache(self.config, self.part(span))

    def step(
        self,
        hidden: Tensor,
        cache: SpanCache | None = None,
        *,
        span: Span | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Run q tokens of B rows through the blocks of `span`, after the tokens that the cache has seen.

        Tensors may be on any device; they are moved. Everything is checked before anything is computed. After any
        other exception than BadMessage the cache is undefined and must be dropped.

        Args:
            hidden: [*streams, B, q, H], of one of `hidden_dtypes`.
            cache: the session's; None for a pass without memory.
            span: the blocks to run; default: the cache's, else all that are loaded.
            attention_mask: [B, n + q], n the tokens seen: nonzero where a token counts, zero for padding. None: all do.
            position_ids: [1 or B, q] (some models: with a dimension before). None: n, n + 1, ...; but with an
                attention mask, None leaves them to the decoder's own rule, which may go by the mask.
            extras: exactly the tensors named in `self.extras`; per_layer_inputs: [B, q, n_blocks, *].
            grad: record for autograd; needs `cache` None. For gradients of inputs alone, take `torch.autograd.grad`:
                `backward` would fill in those of the weights.

        Returns:
            hidden states after the span: shape of `hidden`, one of `hidden_dtypes`, on the model's device.

        Raises:
            BadMessage: a shape, dtype, position or span that does not fit the model or the cache.
        """
        part = self.part(span if span is not None or cache is None else cache.span)
        self._check(hidden, cache, part, attention_mask, position_ids, extras or {}, grad)
        batch, q = hidden.shape[-3], hidden.shape[-2]
        inputs: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in (extras or {}).items()}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device, torch.long)
        if position_ids is None and attention_mask is None:
            # Not left to the decoder: some (bamba) begin at 0 again, whatever the cache has seen.
            seen = cache.n_tokens if cache is not None else 0
            position_ids = torch.arange(seen, seen + q, device=self.device)[None]
        if position_ids is not None and self.takes_positions:
            inputs["position_ids"] = position_ids.to(self.device, torch.long)
        if cache is not None:
            inputs[self._cache_name] = cache
        with torch.enable_grad() if grad else torch.inference_mode():
            output = self.run_decoder(part, hidden.to(self.device), inputs, use_cache=cache is not None)
        if cache is not None:
            cache.advance(batch, q)
        return output

    def run_decoder(self, part: Span, hidden: Tensor, inputs: Mapping[str, Any], *, use_cache: bool) -> Tensor:
        """One pass of the architecture's own decoder, of which only the blocks of `part` do anything.

        Args:
            hidden: [*streams, B, q, H], on the model's device.
            inputs: the decoder's other arguments.
        """
        hidden = hidden.contiguous()
        if hidden.data_ptr() % 64:
            # A tensor cut out of a network buffer can lie anywhere, and kernels round by alignment.
            hidden = hidden.clone()
        # Only shape, dtype and device of this count (masks, rotary positions); the gate puts `hidden` in its place.
        shape = (*hidden.shape[-3:-1], self._embedding_size)
        dummy = torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
        self._pass.begin(part, hidden)
        try:
            self._decoder(inputs_embeds=dummy, use_cache=use_cache, **inputs)
            return self._pass.output()
        finally:
            self._pass.end()

    def copy_blocks(self, span: Span, config: PreTrainedConfig) -> dict[int, nn.Module]:
        """The loaded blocks of `span` as modules for another model, whose configuration they then refer to.

        Their parameters and buffers are the same tensors. The gates stay here.
        """
        blocks = _rebound({i: self.blocks[i] for i in range(span.start, span.stop)}, self.model, config)
        for block in blocks.values():
            del block.__dict__["forward"]  # this model's gate
        return blocks

    def nbytes(self) -> int:
        """Memory of the weights, in bytes."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.nbytes for tensor in tensors) + packed_nbytes(self.model)

    def example_inputs(self, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Zeros that `step` takes: hidden states [*streams, 1, tokens, H], and extras. For measuring."""
        hidden = torch.zeros((*self.streams, 1, tokens, self.hidden_size), dtype=self.dtype, device=self.device)
        width = getattr(text_config(self.config), "hidden_size_per_layer_input", 0) or 0
        extra_shape = (1, tokens, self.n_blocks, width)
        return hidden, {name: torch.zeros(extra_shape, dtype=self.dtype, device=self.device) for name in self.extras}

    def _needs_extra(self, name: str) -> bool:
        return (
            name in self._parameters
            and hasattr(self._decoder, "project_per_layer_inputs")
            and bool(getattr(text_config(self.config), "hidden_size_per_layer_input", 0))
        )

    def part(self, span: Span | None) -> Span:
        """The blocks to run; None: all that are loaded.

        Raises:
            BadMessage: they are not all loaded, or the model cannot be cut there.
        """
        if span is None:
            return self.span
        if not self.span.covers(span) or span.start not in self.legal_cuts or span.stop not in self.legal_cuts:
            cuts = sorted(self.legal_cuts)
            raise BadMessage(f"blocks {span} cannot be served: {self.span} are loaded, cuts at {cuts}")
        return span

    def _check(
        self,
        hidden: Tensor,
        cache: SpanCache | None,
        part: Span,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        extras: Mapping[str, Tensor],
        grad: bool,
    ) -> None:
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
            if cache.span != part:
                raise BadMessage(f"the cache is of blocks {cache.span}, the step of {part}")
            if cache.batch not in (None, batch):
                raise BadMessage(f"the cache has {cache.batch} rows, the step {batch}")
            if grad:
                raise BadMessage("a step with a cache records nothing for autograd")
        if attention_mask is not None:
            if attention_mask.shape != (batch, seen + q):
                raise BadMessage(f"attention mask must be {(batch, seen + q)}, not {tuple(attention_mask.shape)}")
            if attention_mask.is_floating_point() or attention_mask.is_complex():
                raise BadMessage(f"attention mask must be bool or whole numbers, not {attention_mask.dtype}")
        if position_ids is not None:
            self._check_positions(position_ids, batch, q)
        elif self._positions is not None and seen + q > self._positions[1]:
            raise BadMessage(f"the model has positions up to {self._positions[1]}, the session would need {seen + q}")
        if extras.keys() != self.extras:
            raise BadMessage(f"a step needs the tensors {sorted(self.extras)} beside the hidden states")
        for name, tensor in extras.items():
            if tensor.ndim != 4 or tensor.shape[:3] != (batch, q, self.n_blocks) or tensor.dtype != self.dtype:
                raise BadMessage(f"{name} must be {(batch, q, self.n_blocks)} + one dimension, of {self.dtype}")
            if tensor.shape[3] != text_config(self.config).hidden_size_per_layer_input:
                raise BadMessage(f"{name} has the wrong width {tensor.shape[3]}")

    def check_stretch(self, part: Span, hidden: Tensor, start: int) -> None:
        """Raise unless hidden states [1, q, H] can follow `start` tokens in a pass that sessions share.

        Raises:
            BadMessage: a shape, dtype, span or number of tokens that does not fit.
        """
        self.part(part)
        if hidden.ndim != 3 or hidden.shape[0] != 1 or 0 in hidden.shape or hidden.shape[-1] != self.hidden_size:
            raise BadMessage(f"hidden states must be [1, tokens, {self.hidden_size}], not {tuple(hidden.shape)}")
        if hidden.dtype != self.dtype:
            raise BadMessage(f"hidden states must be {self.dtype}, not {hidden.dtype}")
        if self._positions is not None and start + hidden.shape[-2] > self._positions[1]:
            raise BadMessage(
                f"the model has positions up to {self._positions[1]}, the session would need {start + hidden.shape[-2]}"
            )

    def _check_positions(self, position_ids: Tensor, batch: int, q: int) -> None:
        dims = (2, 3) if self._has_position_axes else (2,)
        if position_ids.ndim not in dims or position_ids.shape[-1] != q or position_ids.shape[-2] not in (1, batch):
            raise BadMessage(f"position ids must be {(batch, q)}, not {tuple(position_ids.shape)}")
        if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
            raise BadMessage(f"position ids must be whole numbers, not {position_ids.dtype}")
        if self._positions is not None:
            low, high = int(position_ids.min()), int(position_ids.max())
            # Outside a table a GPU does not raise, it aborts the process.
            if low < self._positions[0] or high >= self._positions[1]:
                raise BadMessage(f"position ids {low} to {high} lie outside the model's {self._positions}")


def _rebound(blocks: Mapping[int, nn.Module], model: PreTrainedModel, config: PreTrainedConfig) -> dict[int, nn.Module]:
    """Copies of blocks of `model` that share its tensors and refer to the configuration of another."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo |= packed_objects(model)
    memo |= {id(model.config): config, id(text_config(model.config)): text_config(config)}
    return copy.deepcopy(dict(blocks), memo)


def _has_position_axes(model: PreTrainedModel) -> bool:
    """Has a token several positions (text, height, width: mrope), so that position ids may have a dimension more?"""
    rope = getattr(text_config(model.config), "rope_parameters", None) or {}
    return "mrope_section" in rope or any(hasattr(module, "mrope_section") for module in model.modules())


def _given_per_layer_inputs(
    inputs_embeds: Tensor, per_layer_inputs: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    return per_layer_inputs


def _table_of_positions(decoder: nn.Module) -> tuple[int, int] | None:
    """The positions [low, high) that the decoder has in a table; None where it computes them.

    Tables are learned (gpt2, opt: an Embedding of the decoder; opt's begins at -2) or made once (gptj, codegen).
    """
    for child in decoder.children():
        if isinstance(child, nn.Embedding):
            offset = getattr(child, "offset", 0)
            return -offset, child.num_embeddings - offset
    for module in decoder.modules():
        made = getattr(module, "embed_positions", None)
        if isinstance(made, Tensor):
            return 0, made.shape[0]
    return None
