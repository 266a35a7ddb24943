"""Blocks that this client has loaded itself: what peers computed with them it can check without believing anybody."""

from __future__ import annotations

import asyncio
import threading
from typing import cast

import torch
from torch import Tensor

from client.shadow import Recomputation
from client.tolerance import Kind
from protocol.errors import ConfigError, PeerFault, WireError
from protocol.journal import Entry
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, token_axis
from protocol.messages import CacheOp as WireOp
from protocol.span import Span
from slicing import CacheOp, ModelSource, SpanModel, load_span
from slicing.cache import CacheOpKind
from slicing.loading import Progress
from tensor_codecs import codec, dtype_name, dtype_of

ALL = "all"


class OwnBlocks:
    """For any number of sessions; their passes come one after the other."""

    def __init__(self, model: SpanModel) -> None:
        self.model = model
        self.one_pass = threading.Lock()

    @classmethod
    def load(
        cls,
        source: ModelSource,
        blocks: str,
        n_blocks: int,
        dtype: torch.dtype | None,
        device: str,
        progress: Progress | None = None,
    ) -> OwnBlocks:
        """The blocks that a setting names: `0:4`, or `all`.

        Raises:
            ConfigError: it names none, or there is too little memory for them.
            ModelError: the model cannot be cut there, or its weights cannot be read.
        """
        span = Span(0, n_blocks) if blocks == ALL else Span.parse(blocks)
        try:
            return cls(load_span(source, span, dtype=dtype, device=device, progress=progress))
        except MemoryError as error:
            raise ConfigError(f"--audit-blocks {blocks}: there is too little memory for these blocks") from error

    @property
    def kind(self) -> Kind:
        """What it computes with."""
        return Kind(dtype_name(self.model.dtype), "none")

    def covers(self, span: Span) -> bool:
        """Are all of these here?"""
        return self.model.span.covers(span) and {span.start, span.stop} <= self.model.legal_cuts


class OwnShadow(Recomputation):
    """This client in the place of one hop. `peer_ids` are none: whoever disagrees with it is wrong.

    Args:
        blocks: that cover `span`.
        codec_name: with which the hop encodes what comes out, so that this rounds here as it does there.
    """

    peer_ids: frozenset[str] = frozenset()
    name = "this client"

    def __init__(self, blocks: OwnBlocks, span: Span, codec_name: str) -> None:
        super().__init__()
        self._blocks = blocks
        self._cache = blocks.model.new_cache(span)
        self._codec = codec(codec_name)

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset({self._blocks.kind})

    async def _compute(self, entry: Entry, timeout_s: float) -> Tensor:
        return await asyncio.to_thread(self._pass, entry)

    def _pass(self, entry: Entry) -> Tensor:
        model = self._blocks.model
        inputs = _decoded(entry)
        hidden = inputs.pop(HIDDEN)
        if hidden.dtype not in model.hidden_dtypes:
            hidden = hidden.to(model.dtype)
        extras = {name: inputs[name].to(model.dtype) for name in model.extras & inputs.keys()}
        with self._blocks.one_pass:
            for op in entry.ops:
                self._cache.apply(_cache_op(op))
            output = model.step(
                hidden,
                self._cache,
                attention_mask=inputs.get(ATTENTION_MASK),
                position_ids=inputs.get(POSITION_IDS),
                extras=extras,
            )
        return self._codec.decode(self._codec.encode(output), output.shape, output.dtype)

    def dismiss(self) -> None:
        """Nobody holds anything for it but this client, which lets go of it."""


def _cache_op(op: WireOp) -> CacheOp:
    kind = cast(CacheOpKind, op.kind)
    return CacheOp(kind, op.values[0] if kind in ("crop", "repeat") else op.values or None)


def _decoded(entry: Entry) -> dict[str, Tensor]:
    """An entry's tensors, as a peer decodes them.

    Raises:
        PeerFault: they cannot be read.
    """
    found: dict[str, list[Tensor]] = {}
    try:
        for part in entry.parts:
            spec = part.spec
            tensor = codec(spec.codec).decode(part.payload, spec.shape, dtype_of(spec.dtype))
            axis = token_axis(spec.name)
            found.setdefault(spec.name, []).append(tensor.narrow(axis, 0, spec.keep) if spec.keep else tensor)
        return {name: torch.cat(tensors, dim=token_axis(name)) for name, tensors in found.items()}
    except (ValueError, RuntimeError, LookupError, WireError) as error:
        raise PeerFault(f"an input that cannot be read: {error}") from error
