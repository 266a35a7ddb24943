"""Weights onto this machine's device: which one, in which number format, how many blocks, and loads that can be given
up in the middle."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import cast

import torch

from peer import memory
from peer.config import PeerConfig
from peer.host import Served
from protocol.errors import ConfigError
from protocol.span import Span
from slicing import ModelSource, Progress, SpanModel, block_bytes, kv_values, load_config, load_span, move_span
from slicing.quantized import Quantization


class _Stopped(Exception):
    """Raised into a load that nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class SpanLoader:
    """Loads spans of one model onto one device.

    Attributes:
        dtype: of the weights; None: the model's own.
        quantization: of the linear layers.
        kv_tokens: for how many tokens to leave room, if the user said.
    """

    source: ModelSource
    served: Served
    device: torch.device
    dtype: torch.dtype | None
    kv_tokens: int | None
    progress: Progress | None
    quantization: Quantization = "none"

    @classmethod
    def choose(
        cls, config: PeerConfig, source: ModelSource, served: Served, progress: Progress | None = None
    ) -> SpanLoader:
        """One for the device and number format that `config` names or leaves open. Blocks.

        Raises:
            ConfigError: there is no such device here, or it does not know the quantisation.
        """
        device = _device(config)
        if config.quantization != "none" and device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"--quantization {config.quantization} works on cpu and cuda, not on {device.type}: leave it out there"
            )
        if config.dtype != "auto":
            dtype = cast("torch.dtype | None", getattr(torch, config.dtype))
        elif device.type == "cpu":
            dtype = cpu_dtype(load_config(source).dtype, multiplies_bfloat16=multiplies_bfloat16())
        else:
            dtype = None
        return cls(source, served, device, dtype, config.kv_tokens, progress, config.quantization)

    def num_blocks(self) -> int:
        """How many blocks fit into the memory that is free now. Blocks for a moment.

        Raises:
            UserError: not even the shortest span of the model.
        """
        config = load_config(self.source)
        dtype = self.dtype or (config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32)
        kv_bytes = (self.kv_tokens or memory.KV_TOKENS_PLANNED) * kv_values(config) * dtype.itemsize
        return memory.blocks_that_fit(
            memory.free_bytes(self.device),
            block_bytes(self.source, self.dtype, self.quantization),
            self.served.legal_cuts,
            kv_bytes,
            what="memory" if self.device.type == "cpu" else f"memory of {self.device}",
        )

    def fits_beside(self, span: Span, old: Span) -> bool:
        """Is there room now for what `span` has more than `old`, which stays loaded? Blocks for a moment."""
        sizes = block_bytes(self.source, self.dtype, self.quantization)
        more = sum(nbytes for i, nbytes in enumerate(sizes) if i in span and i not in old)
        return more <= memory.free_bytes(self.device) * (1 - memory.MARGIN_SHARE)

    async def load(self, span: Span, old: SpanModel | None = None) -> SpanModel:
        """The blocks `span`, those that `old` holds not read again. If the caller is cancelled, the load stops too.

        Raises:
            MemoryError: they do not fit.
            UserError: the files are missing or damaged, or the hub cannot be reached.
            OSError: the disk failed.
        """
        given_up = threading.Event()

        def progress(done_bytes: int, total_bytes: int, what: str, /) -> None:
            if given_up.is_set():
                raise _Stopped
            if self.progress is not None:
                self.progress(done_bytes, total_bytes, what)

        def work() -> SpanModel:
            nonlocal old
            before, old = old, None  # a pool's thread may remember its last work for a while
            if before is not None:
                return move_span(before, self.source, span, progress=progress)
            return load_span(
                self.source,
                span,
                dtype=self.dtype,
                device=self.device,
                quantization=self.quantization,
                progress=progress,
            )

        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            given_up.set()
            raise


def cpu_dtype(stored: object, *, multiplies_bfloat16: bool) -> torch.dtype:
    """What `--dtype auto` computes in on a CPU, of a checkpoint in the dtype `stored`.

    bfloat16 where nothing is lost that the checkpoint holds and the CPU has instructions for it. Without these torch
    converts numbers one by one, which is slower than float32. A checkpoint in float32 is computed in float32: who
    prefers speed says so. float16 has more digits than bfloat16, so it is computed in float32 too.
    """
    return torch.bfloat16 if stored == torch.bfloat16 and multiplies_bfloat16 else torch.float32


def multiplies_bfloat16() -> bool:
    """Has this machine's CPU instructions for it?"""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _device(config: PeerConfig) -> torch.device:
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {reason}") from error
    return device
