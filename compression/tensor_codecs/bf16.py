"""`bf16`: bfloat16, the upper half of a float32. NaN and Inf are kept.

Finite values overflow to infinity only from 3.396e38 on, which in float32 are the last 0.2 % of the range.
"""

from __future__ import annotations

import torch

from tensor_codecs.cast import CastCodec


class Bf16Codec(CastCodec):
    """8 significant bits: a relative error of at most 2**-8 over all of float32's range."""

    name = "bf16"
    wire_dtype = torch.bfloat16
