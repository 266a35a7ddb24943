"""The KV cache of one session whose steps can share a pass with those of others: runs of pages, one for each block.

Keys and values of a session lie one after the other in memory, so attention reads them without a copy. Memory grows by
whole pages, and only when it is told to (`reserve`): whoever holds the budget says when. What is given back is taken by
the next cache from torch's allocator.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from protocol.errors import BadMessage
from protocol.span import Span
from slicing.cache import CacheOp

PAGE_TOKENS = 64


def pages(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class PagedCache:
    """Keys and values of one row over the blocks of `span`. For one thread at a time.

    Unlike a `SpanCache` it keeps all tokens where a block attends to a window only, so that every crop can be done.

    Attributes:
        span: the blocks whose state is here.
        n_tokens: tokens seen so far. What a pass wrote after them is not seen before `advance`.
        capacity: tokens that fit into the pages it may use.
    """

    batch: Literal[1] = 1

    def __init__(self, span: Span) -> None:
        self.span = span
        self.n_tokens = 0
        self.capacity = 0
        self._runs: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, tokens: int) -> None:
        """From now on the cache may grow to so many tokens, in whole pages. Never makes it smaller."""
        self.capacity = max(self.capacity, pages(tokens) * PAGE_TOKENS)

    def write(self, block: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys [kv_heads, q, d_k] and values [kv_heads, q, d_v] of the tokens `start` to `start` + q. Those
        before `start` were seen, or written by earlier passes of the same step.

        Returns:
            all keys and values up to there, views [kv_heads, start + q, *].
        """
        stop = start + keys.shape[1]
        run = self._runs.get(block)
        if run is None or run[0].shape[1] < stop:
            run = self._runs[block] = _grown(run, start, max(self.capacity, stop), keys, values)
        run[0][:, start:stop] = keys
        run[1][:, start:stop] = values
        return run[0][:, :stop], run[1][:, :stop]

    def advance(self, tokens: int) -> None:
        """So many tokens went through all blocks of the span."""
        self.n_tokens += tokens

    def holds(self, block: int) -> bool:
        """Has the block written anything?"""
        return block in self._runs

    def read(self, block: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens seen, views [kv_heads, n_tokens, *]."""
        keys, values = self._runs[block]
        return keys[:, : self.n_tokens], values[:, : self.n_tokens]

    @staticmethod
    def takes(op: CacheOp) -> bool:
        """Can the operation be done here? Those that make several rows need a `SpanCache`."""
        return op.kind in ("crop", "reset", "record_past") or op.value in (1, (0,))

    def check(self, op: CacheOp) -> None:
        """Raise unless `op` can be applied now.

        Raises:
            BadMessage: a crop to more tokens than there are, or an operation that needs several rows.
        """
        if not self.takes(op):
            raise BadMessage(f"a cache of one row knows no {op.kind} to {op.value}")
        if op.kind == "crop" and not (type(op.value) is int and 0 <= op.value <= self.n_tokens):
            raise BadMessage(f"a cache of {self.n_tokens} tokens cannot be cropped to {op.value}")

    def apply(self, op: CacheOp) -> None:
        """Check `op`, then do it. The pages stay, for the tokens to come.

        Raises:
            BadMessage: see `check`; the cache is as it was.
        """
        self.check(op)
        if op.kind == "crop":
            assert isinstance(op.value, int)
            self.n_tokens = op.value
        elif op.kind == "reset":
            self.n_tokens = 0

    def nbytes(self) -> int:
        """The memory that the cache holds, in bytes."""
        return sum(run.nbytes for runs in self._runs.values() for run in runs)


def _grown(
    run: tuple[Tensor, Tensor] | None, kept: int, tokens: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """A run with room for `tokens`, and the first `kept` of the old one in it."""
    grown = tuple(new.new_empty(new.shape[0], tokens, new.shape[2]) for new in (keys, values))
    for old, new in zip(run or (), grown, strict=False):
        new[:, :kept] = old[:, :kept]
    return grown[0], grown[1]
