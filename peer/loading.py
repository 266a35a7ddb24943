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


class _Stopped(Exception):
    """Raised into a load that nobody waits for any more."""


@dataclass(frozen=True, slots=True)
class SpanLoader:
    """Loads spans of one model onto one device.

    Attributes:
        dtype: of the weights; None: the model's own.
        kv_tokens: for how many tokens to leave room, if the user said.
    """

    source: ModelSource
    served: Served
    device: torch.device
    dtype: torch.dtype | None
    kv_tokens: int | None
    progress: Progress | None

    @classmethod
    def choose(
        cls, config: PeerConfig, source: ModelSource, served: Served, progress: Progress | None = None
    ) -> SpanLoader:
        """One for the device and number format that `config` names or leaves open. Blocks.

        Raises:
            ConfigError: there is no such device here.
        """
        device = _device(config)
        dtype: torch.dtype | None = torch.float32 if device.type == "cpu" else None
        if config.dtype != "auto":
            dtype = cast(torch.dtype, getattr(torch, config.dtype))
        return cls(source, served, device, dtype, config.kv_tokens, progress)

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
            block_bytes(self.source, self.dtype),
            self.served.legal_cuts,
            kv_bytes,
            what="memory" if self.device.type == "cpu" else f"memory of {self.device}",
        )

    def fits_beside(self, span: Span, old: Span) -> bool:
        """Is there room now for what `span` has more than `old`, which stays loaded? Blocks for a moment."""
        more = sum(
            nbytes for i, nbytes in enumerate(block_bytes(self.source, self.dtype)) if i in span and i not in old
        )
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
            return load_span(self.source, span, dtype=self.dtype, device=self.device, progress=progress)

        try:
            return await asyncio.to_thread(work)
        except asyncio.CancelledError:
            given_up.set()
            raise


def _device(config: PeerConfig) -> torch.device:
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used on this machine: {reason}") from error
    return device
