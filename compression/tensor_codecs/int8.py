"""`int8`, the default: 8 bits per value under one scale per 64 values, and each row's largest values exactly.

Hidden states hold a few channels that are tens to thousands of times larger than the rest. Under one scale, such a value
leaves its 63 neighbours next to no bits. So a row's largest values are taken out first ("outliers") and travel beside the
others in the tensor's own dtype; what is left of each block sets the block's scale. The idea is LLM.int8()'s (Dettmers et
al. 2022, arXiv:2208.07339); here the *number* of outliers is fixed by the row's width, so that a payload's size says nothing
about the values and no kernel waits for a count.

A row of `width` values, `blocks = ceil(width / 64)` (the last one may be short), `slots = n_slots(width)`:

    int8     [width]    the values, over their block's scale (0 where an outlier was)
    bfloat16 [blocks]   scales: the largest magnitude left in the block / 127
    int16    [slots]    where in the row the outliers were (int32 in rows of more than 32768 values)
    dtype    [slots]    the outliers

The outliers are the `slots` largest magnitudes of the row, but at most 4 out of one block. Scales are bfloat16 and not
float16, because a float16 scale overflows or vanishes where float32 and bfloat16 activations do not.

NaN and Inf count as the largest magnitudes: as many as the outliers' slots take are kept exactly. A block that has more of
them, or float64 values beyond float32's range, decodes to NaN in whole. Blocks whose largest magnitude is under 1e-34 lose
precision towards 0. Finite values in the last 0.5 % of float32's or bfloat16's range may decode to infinity; of float16's,
they stay finite.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch

from protocol.errors import BadPayload
from tensor_codecs.base import Codec

BLOCK: Final = 64
_MAGNITUDE: Final = 0x7FFFFFC0
_PLACE: Final = BLOCK - 1  # the bits of a value's place in its block
_PER_HOME: Final = 3
_SMALLEST_SCALE: Final = 2.0**-120  # its reciprocal is finite, and it is normal in bfloat16
_VALUES_AT_ONCE: Final = 2**19  # bounds the scratch memory to a few times 4 MiB, however long the prompt


def n_blocks(width: int) -> int:
    """The number of 64-value blocks in a row."""
    return -(-width // BLOCK)


def n_homes(width: int) -> int:
    """The number of blocks of a row that outliers are taken out of: an eighth of them, and at least 8 where there are 8."""
    blocks = n_blocks(width)
    return min(blocks, max(8, blocks // 8))


def n_slots(width: int) -> int:
    """The number of outliers in a row."""
    return _PER_HOME * n_homes(width)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the four parts of a row lie. Sizes and places in bytes."""

    blocks: int
    homes: int
    padding: int
    parts: tuple[int, int, int, int]
    index_dtype: torch.dtype

    @property
    def row_nbytes(self) -> int:
        return sum(self.parts)


@lru_cache(maxsize=256)
def _layout(width: int, dtype: torch.dtype) -> _Layout:
    blocks, slots = n_blocks(width), n_slots(width)
    index_dtype = torch.int16 if width <= 2**15 else torch.int32
    parts = (width, torch.bfloat16.itemsize * blocks, index_dtype.itemsize * slots, dtype.itemsize * slots)
    return _Layout(blocks, n_homes(width), -width % BLOCK, parts, index_dtype)


class Int8Codec(Codec):
    """Per-64-value absmax int8 with a fixed number of exact outliers per row. The file's docstring has the layout."""

    name = "int8"

    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        return _layout(width, dtype).row_nbytes

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        layout = _layout(rows.shape[1], rows.dtype)
        at_once = max(1, _VALUES_AT_ONCE // rows.shape[1])
        with torch.inference_mode():  # skips autograd's bookkeeping, a seventh of the time of a single token
            if len(rows) <= at_once:
                return _pack_rows(rows, layout)
            return torch.cat([_pack_rows(some, layout) for some in rows.split(at_once)])

    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        layout = _layout(width, dtype)
        at_once = max(1, _VALUES_AT_ONCE // width)
        if len(packed) <= at_once:
            return _unpack_rows(packed, layout, dtype)
        return torch.cat([_unpack_rows(some, layout, dtype) for some in packed.split(at_once)])

    def _check_rows(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> None:
        # An index past the row would be an exception on a CPU, but on a GPU it takes down the whole process. Seen as
        # unsigned numbers, negative indices are past the row too.
        layout = _layout(width, dtype)
        start = layout.parts[0] + layout.parts[1]
        index = np.ascontiguousarray(packed.numpy()[:, start : start + layout.parts[2]])
        if index.view(np.uint16 if layout.index_dtype == torch.int16 else np.uint32).max() >= width:
            raise BadPayload(f"int8: an outlier outside of its row of {width} values")


def _pack_rows(rows: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """`[rows, width]` of any float dtype -> uint8 `[rows, row_nbytes]`."""
    count, width = rows.shape
    blocks, padding = layout.blocks, layout.padding

    values = rows.to(torch.float32)
    if padding:
        values = torch.nn.functional.pad(values, (0, padding))
    scratch = _scratch_like(values)
    bits = torch.bitwise_and(values.view(torch.int32), _MAGNITUDE, out=scratch.view(torch.int32))
    if padding:
        bits[:, width:] = -1  # below every magnitude: padding is never an outlier
    bits = bits.view(count, blocks, BLOCK)
    peak = bits.amax(dim=-1)

    position = _take_outliers(bits, peak, layout.homes)

    scale = torch.rsub(peak.view(torch.float32), _SMALLEST_SCALE, alpha=-1 / 127).to(torch.bfloat16)
    inverse = scale.to(torch.float32).reciprocal_().unsqueeze(-1)
    # The magnitudes' memory is free by now. No clamp: a rounded scale is at most 2**-9 too small, and 127.25 rounds to 127.
    torch.mul(values.view(count, blocks, BLOCK), inverse, out=scratch.view(count, blocks, BLOCK))
    quantized = scratch.round_()

    packed = torch.empty(count, layout.row_nbytes, dtype=torch.uint8, device=rows.device)
    packed[:, :width].view(torch.int8).copy_(quantized[:, :width])
    beside = (scale, position.to(layout.index_dtype), rows.gather(1, position))
    torch.cat([part.view(torch.uint8) for part in beside], dim=1, out=packed[:, width:])
    return packed


class _Scratch(threading.local):
    values: torch.Tensor | None = None


_scratch = _Scratch()


def _scratch_like(values: torch.Tensor) -> torch.Tensor:
    """Uninitialized memory of the shape of `values`, valid until the thread's next call."""
    if values.device.type != "cpu":
        return torch.empty_like(values)
    if _scratch.values is None or _scratch.values.numel() < values.numel():
        _scratch.values = torch.empty(values.numel())
    return _scratch.values[: values.numel()].view_as(values)


def _take_outliers(bits: torch.Tensor, peak: torch.Tensor, homes: int) -> torch.Tensor:
    """Choose each row's outliers and lower the peaks of the blocks that they come from."""
    rows, blocks = peak.shape
    peaks = peak.numpy()
    mask = (1 << (blocks - 1).bit_length()) - 1
    keys = (peaks & ~mask) | np.arange(blocks, dtype=np.int32)
    keys.partition(blocks - homes, axis=-1)
    home = keys[:, blocks - homes :] & mask

    flat = home + np.arange(0, rows * blocks, blocks)[:, None]
    keys = bits.numpy().reshape(-1, BLOCK).take(flat, axis=0)
    keys |= _PLACES
    keys.partition(BLOCK - _PER_HOME - 1, axis=-1)
    peaks.reshape(-1)[flat] = keys[..., BLOCK - _PER_HOME - 1]
    place = keys[..., BLOCK - _PER_HOME :] & _PLACE
    return torch.from_numpy((place + (home[..., None] * np.int64(BLOCK))).reshape(rows, -1))

_PLACES = np.arange(BLOCK, dtype=np.int32)


def _unpack_rows(packed: torch.Tensor, layout: _Layout, dtype: torch.dtype) -> torch.Tensor:
    """uint8 `[rows, row_nbytes]` -> `[rows, width]` of any float dtype."""
    rows = torch.empty(len(packed), layout.parts[0], dtype=dtype, device=packed.device)
    with torch.inference_mode():
        quantized, scale, index, outliers = packed.split(layout.parts, dim=1)
        scale = scale.contiguous().view(torch.bfloat16).to(torch.float32)
        position = index.contiguous().view(layout.index_dtype).to(torch.int64)
        outliers = outliers.contiguous().view(dtype)

        if dtype == torch.float32 and not layout.padding:
            values = rows
            values.copy_(quantized.view(torch.int8))
        else:
            values = torch.nn.functional.pad(quantized.view(torch.int8).to(torch.float32), (0, layout.padding))
        values.view(len(values), layout.blocks, BLOCK).mul_(scale.unsqueeze(-1))
        if dtype == torch.float16:
            values.clamp_(-65504.0, 65504.0)  # a scale that was rounded up must not turn the largest numbers into infinities
        if values is not rows:
            rows.copy_(values[:, : layout.parts[0]])
        rows.scatter_(1, position, outliers)
    return rows
