"""Products of few rows with a matrix, faster than torch's own: in float32 on a CPU, which is what most tokens cost.

One row, torch multiplies in one thread; the same product over parts of the matrix, one for each thread, gives the same
bits, 1.25 to 1.5 times as fast on two cores. Some rows, a pass that sessions share has: of these torch's kernels for
[n, in] x [in, out] with n of 2 to 32 took 1.5 to 2.8 times as long as those for [out, in] x [in, n], which round
otherwise (2.13, MKL, AVX2). What holds on this machine is found out here, for each shape of matrix.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

TURNED_ROWS: Final = 64  # of a pass, at most, for which matrices are turned
TRIED_ROWS: Final = 8
TRIED_BYTES: Final = 64 << 20  # of matrices, for each way: more than the caches of most processors hold
TRIES: Final = 7
ENOUGH_TRIES: Final = 2
"""Where one way takes less than `CLEAR` of the time of the other by then, no more are needed: peers start sooner."""
CLEAR: Final = 0.85
PAYS: Final = 0.95  # of torch's own time: what takes longer is left to torch
SEED: Final = 7

_pass = threading.local()
"""`is_shared`: does the pass that this thread runs now belong to several sessions?"""


@dataclass(frozen=True, slots=True)
class Ways:
    """How matrices of one shape are multiplied.

    Attributes:
        parts: one row by the matrix in so many parts; 1: as torch does it.
        turns: some rows by the turned matrix.
    """

    parts: int = 1
    turns: bool = False


class FewRows(nn.Linear):
    """A linear layer that has `ways`. Made of one by `hasten`: with the same weights, under the same names."""

    ways: Ways

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own word
        rows = input.numel() // self.in_features
        if rows == 1 and self.ways.parts > 1:
            return in_parts(input, self.weight, self.bias, self.ways.parts)
        if 1 < rows <= TURNED_ROWS and self.ways.turns and getattr(_pass, "is_shared", False):
            return turned(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)


def hasten(module: nn.Module, threads: int, choose: Callable[[Sequence[nn.Linear], int], Ways] | None = None) -> None:
    """Makes each plain linear layer inside `module` a `FewRows`, where that is faster here.

    Args:
        threads: that torch will compute with.
        choose: for layers of one shape; `ways_for` if not given.
    """
    kinds: dict[tuple[int, int, bool], list[nn.Linear]] = {}
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.is_cpu:
            kinds.setdefault((layer.in_features, layer.out_features, layer.bias is not None), []).append(layer)
    for layers in kinds.values():
        ways = (choose or ways_for)(layers, threads)
        for layer in layers if ways != Ways() else ():
            layer.__class__ = FewRows
            cast(FewRows, layer).__dict__["ways"] = ways


@contextmanager
def shared(is_shared: bool) -> Iterator[None]:
    """This thread's passes belong to several sessions meanwhile: rounded otherwise, they may be faster. Alone, a
    session gets the unsplit model's very bits."""
    _pass.is_shared = is_shared
    try:
        yield
    finally:
        _pass.is_shared = False


def in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """x W^T + b of one row, [..., in] -> [..., out], each thread with a part of the rows of W."""
    out, inner = weight.shape
    row = x.reshape(1, 1, inner).expand(parts, 1, inner)
    slices = weight.view(parts, out // parts, inner).transpose(1, 2)
    if bias is None:
        return torch.bmm(row, slices).view(*x.shape[:-1], out)
    return torch.baddbmm(bias.view(parts, 1, out // parts), row, slices).view(*x.shape[:-1], out)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as (W x^T)^T + b: the same sums, rounded in another order."""
    rows = x.reshape(-1, x.shape[-1])
    product = torch.mm(weight, rows.t()).t().contiguous().view(*x.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias


@torch.inference_mode()
def ways_for(layers: Sequence[nn.Linear], threads: int) -> Ways:
    """What is faster here for layers of one shape, and, of one row, gives the same bits."""
    first = layers[0]
    tried = layers[: max(1, TRIED_BYTES // first.weight.nbytes)]
    x = torch.randn(TRIED_ROWS, first.in_features, generator=torch.Generator().manual_seed(SEED))
    turns = _is_faster(turned, x, tried)
    if threads < 2 or first.out_features % threads or not all(layer.weight.is_contiguous() for layer in layers):
        return Ways(turns=turns)
    split = partial(in_parts, parts=threads)
    if not all(torch.equal(split(row, first.weight, first.bias), _plain(row, first)) for row in torch.split(x, 1)):
        return Ways(turns=turns)
    return Ways(threads if _is_faster(split, x[:1], tried) else 1, turns)


def _plain(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _is_faster(way: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """One layer after the other, so that none is in the processor's cache; in turns, so that whatever else the machine
    does meets both."""
    best_s = [math.inf, math.inf]
    for tried in range(TRIES):
        if tried >= ENOUGH_TRIES and min(best_s) < CLEAR * max(best_s):
            break
        for index, multiply in enumerate((way, None)):
            began_s = time.perf_counter()
            for layer in layers:
                _plain(x, layer) if multiply is None else multiply(x, layer.weight, layer.bias)
            best_s[index] = min(best_s[index], time.perf_counter() - began_s)
    return best_s[0] < PAYS * best_s[1]
