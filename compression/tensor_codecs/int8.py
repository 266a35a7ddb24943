"""`int8`, the default: 8 bits per value under one scale per 64 values, and each row's largest values exactly.

Hidden states hold a few channels that are tens to thousands of times larger than the rest. Under one scale, such a
value leaves its 63 neighbours next to no bits. So the largest values are taken out first ("outliers") and travel
beside the others in the tensor's own dtype; what is left of each block sets the block's scale. The idea is
LLM.int8()'s (Dettmers et al. 2022, arXiv:2208.07339); here the *number* of outliers is fixed by the row's width, so
that a payload's size says nothing about the values and no kernel waits for a count.

A row of `width` values has `blocks = ceil(width / 64)` blocks, the last one perhaps short. The 8 blocks with the
largest peaks (an eighth of the blocks where there are more than 64, all where there are fewer than 8) are the
outliers' homes: of each, the 3 largest values are outliers. A row's bytes, little-endian:

    int8     [width]      the values, over their block's scale; at an outlier's place they mean nothing
    bfloat16 [blocks]     scales: the largest magnitude left in the block / 127
    int16    [homes * 3]  where in the row the outliers were (int32 in rows of more than 32768 values)
    dtype    [homes * 3]  the outliers

Neither scales nor outliers are float16 unless the tensor is, because activations of some models overflow it.

NaN and Inf count as the largest magnitudes: up to 3 in a block, in the homes, are kept exactly. The rest of a block
with one that did not fit decodes to NaN, as does that of one with float64 values beyond float32's range. Blocks whose
largest magnitude is under 1e-35 are right to 1e-36 only. Finite values in the last 0.5 % of float32's or bfloat16's
range may decode to infinity; float16's stay finite.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from protocol.errors import BadPayload
from tensor_codecs.base import Codec

BLOCK: Final = 64
_PER_HOME: Final = 3
_PLACE: Final = BLOCK - 1
# Without its sign and with its 6 lowest bits cleared, a float32 seen as an integer orders as its magnitude does, Inf
# and NaN above all numbers, and there is room for the value's place in its block: a sort finds both at once.
_KEY: Final = 0x7FFFFFFF & ~_PLACE
_VALUES_AT_ONCE: Final = 2**19  # bounds the scratch memory, however long the prompt


@dataclass(frozen=True, slots=True)
class _Layout:
    """What follows from a row's width and dtype. `parts`: the bytes of a row's four parts."""

    width: int
    blocks: int
    homes: int
    index_dtype: torch.dtype
    parts: tuple[int, int, int, int]
    row_nbytes: int
    rows_at_once: int

    @property
    def padding(self) -> int:
        return self.blocks * BLOCK - self.width


@lru_cache(maxsize=256)
def _layout_of(width: int, dtype: torch.dtype) -> _Layout:
    blocks = -(-width // BLOCK)
    homes = min(blocks, max(8, blocks // 8))
    slots = homes * _PER_HOME
    index_dtype = torch.int16 if width <= 2**15 else torch.int32
    parts = (width, blocks * torch.bfloat16.itemsize, slots * index_dtype.itemsize, slots * dtype.itemsize)
    return _Layout(width, blocks, homes, index_dtype, parts, sum(parts), max(1, _VALUES_AT_ONCE // width))


class Int8Codec(Codec):
    """Per-64-value absmax int8 with a fixed number of exact outliers per row. The file's docstring has the layout."""

    name = "int8"

    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        return _layout_of(width, dtype).row_nbytes

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        layout = _layout_of(rows.shape[1], rows.dtype)
        with torch.inference_mode():  # without autograd's bookkeeping a single token takes a seventh less
            if rows.shape[0] <= layout.rows_at_once:
                return _pack_rows(rows, layout)
            return torch.cat([_pack_rows(some, layout) for some in _parts(rows, layout.rows_at_once)])

    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        layout = _layout_of(width, dtype)
        if packed.shape[0] <= layout.rows_at_once:
            return _unpack_rows(packed, layout, dtype)
        return torch.cat([_unpack_rows(some, layout, dtype) for some in _parts(packed, layout.rows_at_once)])

    def _check_rows(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> None:
        # A place past the row's end is an exception on a CPU, but on a GPU it takes down the whole process. Seen as
        # unsigned numbers, negative places are past the end too.
        layout = _layout_of(width, dtype)
        start = layout.parts[0] + layout.parts[1]
        index = np.ascontiguousarray(packed.numpy()[:, start : start + layout.parts[2]])
        if index.view(np.uint16 if layout.index_dtype == torch.int16 else np.uint32).max() >= width:
            raise _outside(layout)


def _pack_rows(rows: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """`[rows, width]` of any float dtype -> uint8 `[rows, row_nbytes]`."""
    values = rows.to(torch.float32)
    if layout.padding:
        values = torch.nn.functional.pad(values, (0, layout.padding))
    values = values.view(-1, layout.blocks, BLOCK)

    scratch = _scratch_like(values)
    keys = torch.bitwise_and(values.view(torch.int32), _KEY, out=scratch.view(torch.int32))
    if layout.padding:
        keys[:, -1, -layout.padding :] = -1  # below every magnitude: padding is never an outlier
    peak = keys.amax(dim=-1)
    take_outliers = _take_outliers_numpy if keys.is_cpu else _take_outliers_torch
    position = take_outliers(keys, peak, layout.homes)
    if layout.padding:  # a short block may have had fewer than 3 values to take
        peak.clamp_min_(0)
        position.clamp_max_(layout.width - 1)

    # No clamps: rounded to bfloat16 a scale is at most 2**-9 too small, and 127.25 rounds to 127. In a block of zeros
    # the inverse is infinite and the quotients NaN, which become 0. What lands at an outlier's place nobody reads.
    scale = peak.view(torch.float32).mul_(1 / 127).to(torch.bfloat16)
    inverse = scale.to(torch.float32).reciprocal_().unsqueeze(-1)
    quantized = torch.mul(values, inverse, out=scratch).round_().view(rows.shape[0], -1)

    packed = torch.empty(rows.shape[0], layout.row_nbytes, dtype=torch.uint8, device=rows.device)
    packed[:, : layout.width].view(torch.int8).copy_(quantized[:, : layout.width])
    beside = (scale, position.to(layout.index_dtype), rows.gather(1, position))
    torch.cat([part.view(torch.uint8) for part in beside], dim=1, out=packed[:, layout.width :])
    return packed


def _take_outliers_torch(keys: torch.Tensor, peak: torch.Tensor, homes: int) -> torch.Tensor:
    """Choose each row's outliers, and lower the peaks of their homes to what is left there.

    Args:
        keys: int32 `[rows, blocks, 64]`, see `_KEY`; padding is negative. Not changed.
        peak: int32 `[rows, blocks]`, the largest key of each block. Changed.
        homes: how many blocks of each row are homes.

    Returns:
        int64 `[rows, homes * 3]`: where in its row each outlier lies. In a block of fewer than 3 values some repeat.
    """
    rows, blocks = peak.shape
    home = peak.topk(homes, dim=-1).indices
    row_start = torch.arange(0, rows * blocks, blocks, device=keys.device).unsqueeze(-1)
    at_home = keys.view(-1, BLOCK).index_select(0, (home + row_start).view(-1))
    at_home.bitwise_or_(torch.arange(BLOCK, dtype=torch.int32, device=keys.device))
    largest = at_home.topk(_PER_HOME + 1, dim=-1).values.view(rows, homes, -1)
    peak.scatter_(1, home, largest[..., _PER_HOME])
    return torch.add(largest[..., :_PER_HOME] & _PLACE, home.unsqueeze(-1), alpha=BLOCK).view(rows, -1)


def _take_outliers_numpy(keys: torch.Tensor, peak: torch.Tensor, homes: int) -> torch.Tensor:
    """The same on a CPU, where torch's topk takes 20 times as long on short rows as numpy's partition."""
    rows, blocks = peak.shape
    peaks = peak.numpy()
    mask = (1 << (blocks - 1).bit_length()) - 1
    block_keys = np.bitwise_and(peaks, ~mask)
    block_keys |= _count_to(blocks)
    block_keys.partition(blocks - homes, axis=-1)
    home = block_keys[:, blocks - homes :] & mask

    flat = home + np.arange(0, rows * blocks, blocks)[:, None]
    at_home = keys.numpy().reshape(-1, BLOCK).take(flat, axis=0)
    at_home |= _count_to(BLOCK)
    at_home.partition(BLOCK - _PER_HOME - 1, axis=-1)
    peaks.reshape(-1)[flat] = at_home[..., BLOCK - _PER_HOME - 1]
    place = at_home[..., BLOCK - _PER_HOME :] & _PLACE
    place += (home * BLOCK)[..., None]
    return torch.from_numpy(place.reshape(rows, -1).astype(np.int64))


def _unpack_rows(packed: torch.Tensor, layout: _Layout, dtype: torch.dtype) -> torch.Tensor:
    """uint8 `[rows, row_nbytes]` -> `[rows, width]` of any float dtype."""
    quantized, scale, index, outliers = packed.split_with_sizes(layout.parts, dim=1)
    # Clones, because parts of a row do not start where their dtypes may.
    scale = _clone(scale).view(torch.bfloat16).to(torch.float32)
    position = _clone(index).view(layout.index_dtype).to(torch.int64)

    values = quantized.view(torch.int8).to(torch.float32)
    if layout.padding:
        values = torch.nn.functional.pad(values, (0, layout.padding))
    values.view(-1, layout.blocks, BLOCK).mul_(scale.unsqueeze(-1))
    if layout.padding:
        values = values[:, : layout.width].contiguous()
    if dtype == torch.float16:
        values.clamp_(-65504.0, 65504.0)  # a scale that was rounded up must not make infinities of the largest numbers
    rows = values.to(dtype)
    try:
        return rows.scatter_(1, position, _clone(outliers).view(dtype))
    except RuntimeError:  # scatter_ looks at each index; to look first would take a tenth of the time of decoding
        raise _outside(layout) from None


def _outside(layout: _Layout) -> BadPayload:
    return BadPayload(f"int8: an outlier outside of its row of {layout.width} values")


def _clone(part: torch.Tensor) -> torch.Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _parts(rows: torch.Tensor, at_once: int) -> list[torch.Tensor]:
    return [rows[start : start + at_once] for start in range(0, rows.shape[0], at_once)]


@lru_cache(maxsize=32)
def _count_to(n: int) -> npt.NDArray[np.int32]:
    return np.arange(n, dtype=np.int32)


class _Scratch(threading.local):
    values: torch.Tensor | None = None


_scratch = _Scratch()


def _scratch_like(values: torch.Tensor) -> torch.Tensor:
    """Uninitialized memory of the shape of `values`, valid until the thread's next call."""
    if values.numel() < 2**15 or not values.is_cpu:
        return torch.empty_like(values)
    if _scratch.values is None or _scratch.values.numel() < values.numel():
        _scratch.values = torch.empty(values.numel())
    return _scratch.values[: values.numel()].view_as(values)
