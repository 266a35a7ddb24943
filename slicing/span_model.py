"""A span of a model's blocks, run by the architecture's own code."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from protocol.errors import BadMessage
from protocol.span import Span
from slicing.blocks import load_blocks, rebound
from slicing.cache import SpanCache
from slicing.config import hidden_dtypes, hidden_size, n_blocks, text_config
from slicing.cuts import legal_cuts
from slicing.extras import extras_of, take_ready_made, width_of_extras
from slicing.gates import Pass, gate
from slicing.loading import LoadReport, Progress
from slicing.positions import Positions
from slicing.quantized import Quantization, packed_nbytes
from slicing.shapes import Shapes
from slicing.skeleton import BlockStack, forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slicing.source import ModelSource


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
    model, stack, report = load_blocks(source, span, blocks, dtype, device, quantization, progress)
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
    model, stack, report = load_blocks(source, span, read, old.dtype, old.device, old.quantization, progress)
    if kept is not None:
        blocks = stack.blocks(model)
        for i, block in old.copy_blocks(kept, model.config).items():
            blocks[i] = block
    return SpanModel(model, stack, span, report, old.quantization)


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
        first = self.blocks[span.start]  # without parameters where all its weights are quantised (olmo)
        self.device = next(chain(first.parameters(), first.buffers())).device
        self.legal_cuts = frozenset(legal_cuts(model.config))
        self._decoder = stack.decoder(model)
        parameters = forward_parameters(self._decoder)
        self.takes_positions = "position_ids" in parameters
        self._cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._embedding_size = stack.embedding_size
        self.extras = extras_of(self._decoder, parameters, model.config)
        self._extra_width = width_of_extras(model.config)
        self._shapes = Shapes(
            hidden_size=self.hidden_size,
            streams=self.streams,
            n_blocks=self.n_blocks,
            dtype=self.dtype,
            hidden_dtypes=self.hidden_dtypes,
            positions=Positions.of(model, self._decoder),
            extras=self.extras,
            extra_width=self._extra_width,
        )
        self._pass = Pass(returns_tuple=stack.returns_tuple)
        for i, block in self.blocks.items():
            # An attribute of the instance: the block's class, its name and its parameters stay what they are.
            setattr(block, "forward", gate(self._pass, i, block.forward))  # noqa: B010 (mypy forbids plain assignment)
        if self.extras:
            take_ready_made(self._decoder)

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
        self._shapes.check_step(hidden, cache, part, attention_mask, position_ids, extras or {}, grad)
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
        blocks = rebound({i: self.blocks[i] for i in range(span.start, span.stop)}, self.model, config)
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
        extra_shape = (1, tokens, self.n_blocks, self._extra_width)
        return hidden, {name: torch.zeros(extra_shape, dtype=self.dtype, device=self.device) for name in self.extras}

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

    def check_stretch(self, part: Span, hidden: Tensor, start: int) -> None:
        """Raise unless hidden states [1, q, H] can follow `start` tokens in a pass that sessions share.

        Raises:
            BadMessage: a shape, dtype, span or number of tokens that does not fit.
        """
        self.part(part)
        self._shapes.check_stretch(hidden, start)
