"""What `fp16` and `bf16` share: a cast to 16 bits on the way out, a cast back on the way in."""

from __future__ import annotations

from typing import ClassVar

import torch

from tensor_codecs.base import Codec


class CastCodec(Codec):
    """Two bytes per value: `rows.to(wire_dtype)`, rounded to nearest even."""

    wire_dtype: ClassVar[torch.dtype]

    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        return width * self.wire_dtype.itemsize

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.wire_dtype).view(torch.uint8)

    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return packed.view(self.wire_dtype).to(dtype)
