"""Tensors to bytes and back, for the wire. One interface, one file per codec.

| name | bytes per value | what it keeps |
|---|---|---|
| `int8` (the default) | ~1.06 | 8 bits per value under a scale per 64 values; each row's largest values exactly |
| `bf16` | 2 | float32's range, 8 significant bits |
| `fp16` | 2 | 11 significant bits; magnitudes from 65520 up become infinite |
| `blockwise8` | ~1.001 to 1.06 | bitsandbytes' dynamic 8-bit map, as Petals and hivemind use it |
| `none` | the dtype's own | everything |

Three rules hold for every codec, and the tests hold each codec to them:

- **row-local**: a row is a slice along the last dimension; its bytes depend on that row alone, and rows lie one after
  the other. So `encode(cat(a, b))` along the first dimension is `encode(a) + encode(b)`: chunking, batching and
  replay never change a value.
- **static**: `nbytes(shape, dtype)` is the exact size of a payload, whatever the values. A receiver refuses a wrong
  size before it takes memory, and a GPU never waits for a count.
- **NaN and Inf never turn into plausible numbers**: they are kept, or they spoil their whole block (each file says
  which).
"""

from __future__ import annotations

from tensor_codecs.base import Buffer, Codec
from tensor_codecs.dtypes import dtype_name, dtype_of
from tensor_codecs.registry import DEFAULT, codec, names

__all__ = ["DEFAULT", "Buffer", "Codec", "codec", "dtype_name", "dtype_of", "names"]
