"""One LM head for all answers under way: what waits at the same time is multiplied at once.

The head's weights are by far the most that a client reads from memory for a token (131 MB for 32,000 tokens of 1,024
float32 values); one product with eight rows reads them once. Whoever comes first computes for all that wait, and those
that come meanwhile are the next product's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from protocol.mean import smoothed
from slicing.rows import FewRows, shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_ROWS = 32  # of one caller: more of them make a product of their own worth its while


@dataclass(slots=True, eq=False)
class _Rows:
    """One caller's part of a product: hidden states [..., H], then what came of them."""

    hidden: Tensor
    output: Tensor | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        return self.output is not None or self.error is not None

    def result(self) -> Tensor:
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output


class SharedHead:
    """The forward of an `nn.Linear`, for callers in several threads.

    A caller that is alone gets the layer's very bits. Rows that were multiplied together may be rounded otherwise: by
    1e-4 at most, in float32.

    Args:
        layer: whose weights are used.
        clock: seconds, monotonic.
    """

    def __init__(self, layer: nn.Linear, clock: Callable[[], float] = time.monotonic) -> None:
        self.products = 0
        self._alone: Callable[[Tensor], Tensor] = layer.forward
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[_Rows] = []
        self._expected: dict[int, float] = {}  # threads that will come, and since when that is known
        self._is_multiplying = False
        self._product_s = 0.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> SharedHead | None:
        """The model's LM head, shared from now on; None: it has none that is a plain matrix."""
        layer: Any = cast(Any, model).get_output_embeddings()
        if type(layer) not in (nn.Linear, FewRows):
            return None
        head = cls(cast(nn.Linear, layer))
        setattr(layer, "forward", head)  # noqa: B010 (mypy forbids assignment)
        return head

    def expect(self, thread: int) -> None:
        """That thread will come soon: it has just been given hidden states."""
        with self._changed:
            self._expected[thread] = self._clock()

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits [..., q, V] of hidden states [..., q, H]."""
        mine, me = _Rows(hidden), threading.get_ident()
        if hidden.requires_grad or hidden.numel() > MOST_ROWS * hidden.shape[-1]:
            with self._changed:
                self._forget(me)
            return self._alone(hidden)
        with self._changed:
            self._waiting.append(mine)
            self._forget(me)
            self._changed.wait_for(lambda: mine.is_done or not self._is_multiplying)
            if mine.is_done:
                return mine.result()
            self._is_multiplying = True
        try:
            self._multiply(self._gathered())
        finally:
            with self._changed:
                self._is_multiplying = False
                self._changed.notify_all()
        return mine.result()

    def _forget(self, thread: int) -> None:
        """It has come."""
        if self._expected.pop(thread, None) is not None and self._is_multiplying:
            self._changed.notify_all()

    def _gathered(self) -> list[_Rows]:
        """All that wait. Those that have hidden states already are waited for, for no longer than a product of their
        own would take."""
        with self._changed:
            deadline_s = self._clock() + self._product_s
            while (left_s := deadline_s - self._clock()) > 0 and self._are_coming():
                self._changed.wait(left_s)
            taken, self._waiting = self._waiting, []
            return taken

    def _are_coming(self) -> bool:
        """Is anybody expected, and not so late that something must have happened to it?"""
        since_s = self._clock() - self._product_s
        self._expected = {thread: at_s for thread, at_s in self._expected.items() if at_s > since_s}
        return bool(self._expected)

    def _multiply(self, taken: list[_Rows]) -> None:
        """One product. What goes wrong in it, each caller is told."""
        started_s = self._clock()
        try:
            if len(taken) == 1:
                taken[0].output = self._alone(taken[0].hidden)
            else:
                rows = [part.hidden.reshape(-1, part.hidden.shape[-1]) for part in taken]
                with shared(True):
                    together = self._alone(torch.cat(rows))
                products = torch.split(together, [len(each) for each in rows])
                for part, output in zip(taken, products, strict=True):
                    part.output = output.view(*part.hidden.shape[:-1], output.shape[-1])
        except BaseException as error:  # noqa: BLE001  # raised where the results are asked for
            for part in taken:
                part.error = error
        self.products += 1
        self._product_s = smoothed(self._product_s or None, self._clock() - started_s)
