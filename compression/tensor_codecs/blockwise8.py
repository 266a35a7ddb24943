"""`blockwise8`: bitsandbytes' dynamic 8-bit map, as Petals and hivemind send activations.

Each value becomes the index of the nearest of 256 levels, spaced by powers of ten with linear steps between (Dettmers
et al. 2021, arXiv:2110.02861), after division by its block's largest magnitude. Petals and hivemind cut the flattened
tensor into blocks of 4096, across rows; here a block never leaves its row: it is the largest of bitsandbytes' block
sizes that divides the row's width, else 64 with a short last block.

A row of `width` values: uint8 `[width]` levels, then float32 `[blocks]` largest magnitudes.

A block that holds NaN or Inf decodes to NaN in whole (bitsandbytes alone would make a number of a NaN). bitsandbytes
takes seconds to import and is imported at the first tensor, not before.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch

from tensor_codecs.base import Codec

_BLOCK_SIZES: Final = (4096, 2048, 1024, 512, 256, 128, 64)  # those that bitsandbytes' CUDA kernels have


def block_size(width: int) -> int:
    """The number of values that share one scale, in rows of this width."""
    return next((size for size in _BLOCK_SIZES if width % size == 0), _BLOCK_SIZES[-1])


class Blockwise8Codec(Codec):
    """Dynamic 8-bit blockwise quantization through bitsandbytes. The file's docstring has the layout."""

    name = "blockwise8"

    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        return width + torch.float32.itemsize * -(-width // block_size(width))

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import quantize_blockwise

        count, width = rows.shape
        size = block_size(width)
        values = torch.nn.functional.pad(rows.to(torch.float32), (0, -width % size))
        levels, state = quantize_blockwise(values, blocksize=size)
        peak = values.view(-1, size).abs().amax(dim=-1)
        scale = torch.where(peak.isfinite(), state.absmax, torch.nan)
        return torch.cat([levels[:, :width], scale.view(count, -1).view(torch.uint8)], dim=1)

    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        size = block_size(width)
        levels = torch.nn.functional.pad(packed[:, :width], (0, -width % size))
        scale = packed[:, width:].clone(memory_format=torch.contiguous_format).view(torch.float32).view(-1)
        values = dequantize_blockwise(levels, absmax=scale, code=_code(packed.device), blocksize=size)
        return values[:, :width].to(dtype).contiguous()


@lru_cache(maxsize=16)
def _code(device: torch.device) -> torch.Tensor:
    """float32 `[256]`: the levels, which bitsandbytes counts anew at each call."""
    from bitsandbytes.functional import create_dynamic_map

    code: torch.Tensor = create_dynamic_map().to(device)  # type: ignore[no-untyped-call,unused-ignore]
    return code
