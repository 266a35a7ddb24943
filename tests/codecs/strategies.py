"""Tensors for the codec tests: made by hypothesis from a seed, so that big ones cost nothing to draw."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

shapes = st.lists(st.integers(0, 4), max_size=3).flatmap(
    lambda head: st.sampled_from([(), (0,), (1,), (2,), (3,), (63,), (64,), (65,), (129,), (200,), (600,)]).map(
        lambda tail: (*head, *tail) if tail else ()
    )
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def rows(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = FLOATS, max_rows: int = 4) -> torch.Tensor:
    """`[rows, width]` of mixed scales: ordinary values, zeros, and a few outliers up to 10,000 times as large."""
    count = draw(st.integers(1, max_rows))
    width = draw(st.sampled_from([1, 2, 3, 5, 63, 64, 65, 128, 130, 513, 1024]))
    generator = seeded(draw(st.integers(0, 2**32)))
    x = torch.randn(count, width, generator=generator)
    x *= 10.0 ** torch.randint(-2, 2, (count, 1), generator=generator)
    x[torch.rand(count, width, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
    x[torch.rand(count, width, generator=generator) < draw(st.sampled_from([0.0, 0.01, 0.2]))] *= draw(
        st.sampled_from([20.0, 10_000.0])
    )
    return x.clamp(-60_000, 60_000).to(draw(st.sampled_from(dtypes)))  # finite in float16 too


def heavy(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as language models have them, 6 channels times 60 and 0.01 % of values times 20; and which are inliers."""
    generator = seeded(seed)
    x = torch.randn(count, width, generator=generator)
    inlier = torch.ones(count, width, dtype=torch.bool)
    channels = torch.randperm(width, generator=generator)[:6]
    x[:, channels] *= 60
    inlier[:, channels] = False
    scattered = torch.rand(count, width, generator=generator) < 1e-4
    x[scattered] *= 20
    inlier[scattered] = False
    return x, inlier


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 error."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(bits(a), bits(b)))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
