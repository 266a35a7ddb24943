"""How far two honest peers may be apart that compute the same: measured, with a margin. Pure.

They start from the same bytes, but round differently: by their number format and their kernels, by whether tokens came
one by one or many at once, and once more when the result is encoded. Quantised weights are another model, a little:
peers are compared with their like, or within a wider bound. docs/lying-peers.md has the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dht.record import PeerRecord

MARGIN: Final = 4.0
"""Times the largest distance that rounding was measured to put between honest peers of a small model."""
WEIGHTS_MARGIN: Final = 2.0
"""The same for weights that are not the same: rounding them once is no matter of chance."""

NOISE: Final[dict[str, float]] = {"float32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
"""Of one peer's number format: largest relative distance of a token's output from that of another way to compute it.
In float32 far more than was measured on CPUs: some GPUs multiply as in float16."""
WEIGHTS: Final[dict[str, float]] = {"": 0.0, "none": 0.0, "int8": 0.15, "nf4": 0.3}
"""Of one peer's quantised weights, from the model's own."""
LIKE: Final[dict[str, float]] = {"": 0.0, "none": 0.0, "int8": 0.1, "nf4": 0.0}
"""Between two peers whose weights are quantised alike: with `int8` activations are rounded, too."""
CODEC: Final[dict[str, float]] = {"none": 0.0, "fp16": 1e-3, "bf16": 8e-3, "int8": 1.5e-2, "blockwise8": 3e-2}
"""Of encoding: largest distance that it puts between two results which differ by as good as nothing."""
COARSEST: Final = "bfloat16"  # an unknown number format is taken for this one

TYPICAL_MARGIN: Final = 4.0
"""Times the median distance of many tokens that was measured between honest peers."""
TYPICAL_NOISE: Final[dict[str, float]] = {"float32": 6e-4, "float16": 6e-4, "bfloat16": 4e-3}
"""Of one block in this number format: the median. Two that round alike are less apart than one that does from float32,
so the coarser one counts. In float32 some GPUs multiply as in float16."""
TYPICAL_WEIGHTS: Final[dict[str, float]] = {"": 0.0, "none": 0.0, "int8": 1.7e-2, "nf4": 5.5e-2}
"""Of one block with quantised weights, from the model's own."""
TYPICAL_LIKE: Final[dict[str, float]] = {"": 0.0, "none": 0.0, "int8": 1.7e-2, "nf4": 1.7e-2}
"""Of one block between two peers whose weights are quantised alike: perhaps from other number formats."""
TYPICAL_CODEC: Final[dict[str, float]] = {"none": 0.0, "fp16": 3e-4, "bf16": 2e-3, "int8": 6e-3, "blockwise8": 1.2e-2}
"""Of encoding once."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a peer computes with, by its record."""

    dtype: str = ""
    quantization: str = ""


def kind_of(peer: PeerRecord) -> Kind:
    """What the peer says that it computes with."""
    return Kind(peer.dtype, peer.quantization)


def bound(one: Kind, other: Kind, codec: str) -> float:
    """The relative distance up to which two peers count as agreeing."""
    noise = sum(NOISE.get(kind.dtype, NOISE[COARSEST]) for kind in (one, other))
    noise += CODEC.get(codec, max(CODEC.values()))
    if (one.quantization or "none") == (other.quantization or "none"):
        return MARGIN * (noise + LIKE.get(one.quantization, max(LIKE.values())))
    weights = sum(WEIGHTS.get(kind.quantization, max(WEIGHTS.values())) for kind in (one, other))
    return MARGIN * noise + WEIGHTS_MARGIN * weights


def typical(one: Kind, other: Kind, codec: str, blocks: int, crossings: int = 1) -> float:
    """The median of many tokens' distances up to which two peers count as agreeing. What each block contributes is as
    good as independent: squares add up.

    Args:
        blocks: that both have computed.
        crossings: how often results were encoded, by both: once at the end, and between the peers of a shadow.
    """
    noise = max(TYPICAL_NOISE.get(kind.dtype, TYPICAL_NOISE[COARSEST]) for kind in (one, other))
    if (one.quantization or "none") == (other.quantization or "none"):
        weights = [TYPICAL_LIKE.get(one.quantization, max(TYPICAL_LIKE.values()))]
    else:
        weights = [TYPICAL_WEIGHTS.get(kind.quantization, max(TYPICAL_WEIGHTS.values())) for kind in (one, other)]
    encoding = math.sqrt(crossings) * TYPICAL_CODEC.get(codec, max(TYPICAL_CODEC.values()))
    return TYPICAL_MARGIN * math.hypot(math.sqrt(blocks) * math.hypot(noise, *weights), encoding)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far two peers may be apart: for a single token, and for the median of many."""

    token: float
    typical: float

    @classmethod
    def between(cls, one: Kind, other: Kind, codec: str, blocks: int, crossings: int = 1) -> Tolerance:
        """See `bound` and `typical`."""
        return cls(bound(one, other, codec), typical(one, other, codec, blocks, crossings))

    def of(self, tokens: int) -> float:
        """For the median of so many."""
        return self.token if tokens == 1 else self.typical


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Of each token's outputs: the L2 norm of the difference over the larger one's. float64 [tokens], the largest over
    rows; infinite where a value is none.

    Args:
        one, other: [..., tokens, width], of one shape.
    """
    apart = _relative(one, other)
    return apart.reshape(-1, apart.shape[-1]).amax(dim=0)


def row_distances(one: Tensor, other: Tensor) -> Tensor:
    """The same of each row's tokens: float64 [rows, tokens].

    Args:
        one, other: [..., rows, tokens, width], of one shape.
    """
    apart = _relative(one, other)
    return apart.reshape(-1, *apart.shape[-2:]).amax(dim=0)


def _relative(one: Tensor, other: Tensor) -> Tensor:
    a, b = one.detach().double().cpu(), other.detach().double().cpu()
    norms = torch.maximum(a.norm(dim=-1), b.norm(dim=-1)).clamp_min(1e-30)
    return torch.nan_to_num((a - b).norm(dim=-1) / norms, nan=torch.inf)
