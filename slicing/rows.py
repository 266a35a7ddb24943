"""Products of few rows with a matrix, faster than torch's own: in float32 on a CPU, which is what most tokens cost.

One row, torch multiplies in one thread; the same product over parts of the matrix, one for each thread, gives the same
bits, 1.25 to 1.5 times as fast on two cores. Some rows, a pass that sessions share has: of these torch's kernels for
[n, in] x [in, out] with n of 2 to 32 took 1.5 to 2.8 times as long as those for [out, in] x [in, n], which round
otherwise (2.13, MKL, AVX2). What holds on this machine is found out here, for each shape of matrix.
"""

from __future__ import annotations

import threading
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

TURNED_ROWS: Final = 64  # of a pass, at most, for which matrices are turned
TRIED_ROWS: Final = 8
TRIES: Final = 5
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


def hasten(module: nn.Module, threads: int, choose: Callable[[nn.Linear, int], Ways] | None = None) -> None:
    """Makes each plain linear layer inside `module` a `FewRows`, where that is faster here.

    Args:
        threads: that torch will compute with.
        choose: for one layer of each shape; `ways_for` if not given.
    """
    choose = choose or ways_for
    found: dict[tuple[int, int, bool], Ways] = {}
    for layer in module.modules():
        if type(layer) is not nn.Linear or layer.weight.dtype != torch.float32 or not layer.weight.is_cpu:
            continue
        kind = (layer.in_features, layer.out_features, layer.bias is not None)
        if kind not in found:
            found[kind] = choose(layer, threads)
        if found[kind] != Ways():
            layer.__class__ = FewRows
            cast(FewRows, layer).__dict__["ways"] = found[kind]


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
def ways_for(layer: nn.Linear, threads: int) -> Ways:
    """What is faster here for this layer, and, of one row, gives the same bits."""
    weight, bias = layer.weight, layer.bias
    x = torch.randn(TRIED_ROWS, layer.in_features, generator=torch.Generator().manual_seed(SEED))
    plain = partial(functional.linear, weight=weight, bias=bias)
    turns = _is_faster(partial(turned, weight=weight, bias=bias), plain, x)
    split = partial(in_parts, weight=weight, bias=bias, parts=threads)
    if threads < 2 or layer.out_features % threads or not weight.is_contiguous():
        return Ways(turns=turns)
    if not all(torch.equal(split(row), plain(row)) for row in torch.split(x, 1)):
        return Ways(turns=turns)
    return Ways(threads if _is_faster(split, plain, x[:1]) else 1, turns)


def _is_faster(way: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    way_s, plain_s = (min(timeit.repeat(partial(each, x), number=1, repeat=TRIES)) for each in (way, plain))
    return way_s < PAYS * plain_s
