"""`fp16`: IEEE half precision. NaN and Inf are kept.

Overflow follows IEEE: a magnitude of 65520 or more becomes infinite. It is not clamped to 65504, since a wrong finite
number would pass unseen where an infinity does not. Models whose activations go that far need `bf16` or `int8`.
Magnitudes under 6e-8 become 0.
"""

from __future__ import annotations

import torch

from tensor_codecs.cast import CastCodec


class Fp16Codec(CastCodec):
    """11 significant bits: a relative error of at most 2**-11 from 6.1e-5 to 65504."""

    name = "fp16"
    wire_dtype = torch.float16
