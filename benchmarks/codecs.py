"""Bytes, error and time of each codec. Writes `docs/codecs.md`.

Times are ratios to casting the same tensor to bfloat16 and back, on one thread, medians of repeats that are interleaved
so that whatever else the machine does falls on all alike. Errors are relative L2 errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import torch

from tensor_codecs import Codec, codec, names

SHAPES: Final = ((1, 1, 4096), (1, 128, 4096))
REPEATS: Final = 60
DOC: Final = Path(__file__).parents[1] / "docs" / "codecs.md"

INTRODUCTION: Final = """\
# Codecs

How activations become bytes. A chain uses one codec, which all its peers offer in their records; `int8` is the
default. Every codec is row-local (a token's bytes depend on that token alone) and of static size; the rules for NaN,
Inf and overflow stand at the top of each file in `compression/tensor_codecs/`.

This page is written by `python -m benchmarks run codecs`.

- **B/value**: payload bytes per value of a float32 tensor of width 4096; of a bfloat16 one in parentheses.
- **Gaussian, heavy, inliers**: relative L2 error on normally distributed rows; on rows with outliers as language models
  have them (6 channels times 60, 0.01 % of values times 20); and on the values of these that are no outliers. Width
  4096, float32.
- **time**: encode, plus decode, over casting the same float32 tensor to bfloat16 and back; one thread, medians of
  {repeats} interleaved repeats, each the best of 7 calls in a row; torch {torch} on {capability}. On one token nearly
  all of it is the fixed cost of calling kernels: the last column is that time in microseconds, on the machine that
  wrote this page.
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians, in seconds."""

    cast_s: float  # to bfloat16 and back
    encode_s: float
    decode_s: float

    @property
    def codec_s(self) -> float:
        return self.encode_s + self.decode_s

    @property
    def ratio(self) -> float:
        return self.codec_s / self.cast_s


def gaussian(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """float32, normally distributed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outlier_heavy(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """float32: Gaussian, 6 random channels times 60, 0.01 % of values times 20. And bool: which are not outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    channels = torch.randperm(shape[-1], generator=generator)[:6]
    scattered = torch.rand(shape, generator=generator) < 1e-4
    inlier = ~scattered
    inlier[..., channels] = False
    x[..., channels] *= 60
    return torch.where(scattered, x * 20, x), inlier


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The L2 norm of the difference over that of `want`."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


def round_trip(using: Codec, x: torch.Tensor) -> torch.Tensor:
    """What the other side sees."""
    return using.decode(using.encode(x), x.shape, x.dtype)


def activation_errors(cuts: Mapping[int, torch.Tensor]) -> str:
    """A Markdown table of each codec's relative L2 error on a model's own activations.

    Args:
        cuts: block index -> the hidden states that enter that block, `[..., hidden]`, any float dtype.

    Returns:
        One line per cut: its peak (largest magnitude over root mean square) and the error of each codec.
    """
    lossy = [name for name in names() if name != "none"]
    lines = [f"| cut | peak | {' | '.join(lossy)} |", "|---" * (len(lossy) + 2) + "|"]
    for cut, x in sorted(cuts.items()):
        peak = float(x.double().abs().amax() / x.double().square().mean().sqrt())
        errors = (f"{relative_error(round_trip(codec(name), x), x):.1e}" for name in lossy)
        lines.append(f"| {cut} | {peak:.0f} | {' | '.join(errors)} |")
    return "\n".join(lines)


def time_all(x: torch.Tensor, repeats: int = REPEATS) -> dict[str, Timing]:
    """Each codec's time on `x`. In each repeat the cast and all codecs have a turn, so that all see one machine."""
    calls: dict[str, Callable[[], object]] = {"cast": lambda: x.to(torch.bfloat16).to(torch.float32)}
    for name in names():
        calls[f"{name} encode"] = partial(codec(name).encode, x)
        calls[f"{name} decode"] = partial(codec(name).decode, codec(name).encode(x), x.shape, x.dtype)
    turns: dict[str, list[float]] = {call: [] for call in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            turns[name].append(_turn(call))
    seconds = {name: median(each) for name, each in turns.items()}
    return {name: Timing(seconds["cast"], seconds[f"{name} encode"], seconds[f"{name} decode"]) for name in names()}


def _turn(call: Callable[[], object], calls: int = 7) -> float:
    """The least time of a few calls in a row, in seconds: caches are warm then, and nobody else had the core."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def report() -> str:
    """The page, as Markdown."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timings = {shape: time_all(gaussian(shape)) for shape in SHAPES}
    finally:
        torch.set_num_threads(threads)

    normal, (heavy, inlier) = gaussian((1, 128, 4096), seed=1), outlier_heavy((1, 128, 4096), seed=1)
    sizes = ["x".join(map(str, shape)) for shape in SHAPES]
    head = ["codec", "B/value", "Gaussian", "heavy", "inliers", *(f"time {size}" for size in sizes), f"us {sizes[0]}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names():
        using = codec(name)
        per_value = [using.nbytes((4096,), dtype) / 4096 for dtype in (torch.float32, torch.bfloat16)]
        decoded = round_trip(using, heavy)
        cells = [
            f"`{name}`",
            "{:.3f} ({:.3f})".format(*per_value),
            f"{relative_error(round_trip(using, normal), normal):.1e}",
            f"{relative_error(decoded, heavy):.1e}",
            f"{relative_error(decoded[inlier], heavy[inlier]):.1e}",
            *(f"{timings[shape][name].ratio:.1f}" for shape in SHAPES),
            f"{timings[SHAPES[0]][name].codec_s * 1e6:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    introduction = INTRODUCTION.format(
        repeats=REPEATS, torch=torch.__version__, capability=torch.backends.cpu.get_cpu_capability()
    )
    return introduction + "\n" + "\n".join(lines) + "\n"


def run() -> None:
    """Print the page and write it."""
    page = report()
    print(page)
    DOC.write_text(page, encoding="utf-8")
