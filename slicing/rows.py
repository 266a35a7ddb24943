"""Products of few rows with a matrix, faster than torch's own: in float32 on a CPU, which is what most tokens cost.

One row, torch multiplies in one thread; the same product over parts of the matrix, one for each thread, gives the same
bits, 1.25 to 1.5 times as fast on two cores. Some rows, a pass that sessions share has: of these torch's kernels for
[n, in] x [in, out] with n of 2 to 32 took 1.5 to 2.8 times as long as those for [out, in] x [in, n], which round
otherwise (2.13, MKL, AVX2); with AVX-512 3 times for n of 2 to 4, and as long for 8, which are quicker four at a time.
What holds on this machine is found out here, for each shape of matrix.
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
TRIED_ROWS: Final = (4, 8, 16)
"""Other numbers go by the next larger one, or the last."""
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
        at_once: some rows by the turned matrix, so many at once, for each number of `TRIED_ROWS`; 0: as torch does it.
    """

    parts: int = 1
    at_once: tuple[int, ...] = (0,) * len(TRIED_ROWS)

    def turns(self, rows: int) -> int:
        """How many of so many rows at once; 0: torch's own product."""
        if not 1 < rows <= TURNED_ROWS:
            return 0
        return next(
            (found for tried, found in zip(TRIED_ROWS, self.at_once, strict=True) if rows <= tried), self.at_once[-1]
        )


class FewRows(nn.Linear):
    """A linear layer that has `ways`. Made of one by `hasten`: with the same weights, under the same names."""

    ways: Ways

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own word
        rows = input.numel() // self.in_features
        if rows == 1 and self.ways.parts > 1:
            return in_parts(input, self.weight, self.bias, self.ways.parts)
        if getattr(_pass, "is_shared", False) and (at_once := self.ways.turns(rows)):
            return turned(input, self.weight, self.bias, at_once)
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


def turned(x: Tensor, weight: Tensor, bias: Tensor | None, at_once: int = TURNED_ROWS) -> Tensor:
    """x W^T + b as (W x^T)^T + b, for so many rows at once: the same sums, rounded in another order."""
    rows = x.reshape(-1, x.shape[-1])
    groups = torch.tensor_split(rows, -(-len(rows) // at_once))
    product = torch.cat([torch.mm(weight, group.t()).t() for group in groups]).view(*x.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias


@torch.inference_mode()
def ways_for(layers: Sequence[nn.Linear], threads: int) -> Ways:
    """What is faster here for layers of one shape, and, of one row, gives the same bits."""
    first = layers[0]
    tried = layers[: max(1, TRIED_BYTES // first.weight.nbytes)]
    x = torch.randn(max(TRIED_ROWS), first.in_features, generator=torch.Generator().manual_seed(SEED))
    times_s = [_times_s(turned, x[:rows], tried) for rows in TRIED_ROWS]
    at_once = tuple(fastest_groups(times_s))
    if threads < 2 or first.out_features % threads or not all(layer.weight.is_contiguous() for layer in layers):
        return Ways(at_once=at_once)
    split = partial(in_parts, parts=threads)
    if not all(torch.equal(split(row, first.weight, first.bias), _plain(row, first)) for row in torch.split(x, 1)):
        return Ways(at_once=at_once)
    split_s, plain_s = _times_s(split, x[:1], tried)
    return Ways(threads if split_s < PAYS * plain_s else 1, at_once)


def fastest_groups(times_s: Sequence[tuple[float, float]]) -> Iterator[int]:
    """For each number of `TRIED_ROWS`, how many of these rows to multiply at once; 0: torch's own product.

    Args:
        times_s: of each number of rows by the turned matrix at once, and by torch.
    """
    for index, rows in enumerate(TRIED_ROWS):
        group_s = {group: rows / group * times_s[i][0] for i, group in enumerate(TRIED_ROWS[: index + 1])}
        group = min(group_s, key=lambda group: group_s[group])
        at_once = TURNED_ROWS if group == rows else group
        yield at_once if group_s[group] < PAYS * times_s[index][1] else 0


def _plain(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight, layer.bias)


def _times_s(
    way: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, layers: Sequence[nn.Linear]
) -> tuple[float, float]:
    """What all layers take that way, and torch's. One layer after the other, so that none is in the processor's cache;
    in turns, so that whatever else the machine does meets both."""
    best_s = [math.inf, math.inf]
    for tried in range(TRIES):
        if tried >= ENOUGH_TRIES and min(best_s) < CLEAR * max(best_s):
            break
        for index, multiply in enumerate((way, None)):
            began_s = time.perf_counter()
            for layer in layers:
                _plain(x, layer) if multiply is None else multiply(x, layer.weight, layer.bias)
            best_s[index] = min(best_s[index], time.perf_counter() - began_s)
    return best_s[0], best_s[1]
