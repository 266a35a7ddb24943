"""`none`: the dtype's own bytes. Bit-exact for every value, NaN payloads included; takes integers and bool too."""

from __future__ import annotations

import torch

from tensor_codecs.base import Codec
from tensor_codecs.dtypes import ALL


class NoCodec(Codec):
    """The dtype's own bytes, little-endian."""

    name = "none"
    dtypes = ALL

    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        return width * dtype.itemsize

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(torch.uint8)

    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.bool:
            return packed != 0  # a byte other than 0 and 1 seen as a bool is undefined behaviour
        return packed.view(dtype)
