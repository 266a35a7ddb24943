"""How fast this peer is, as its records say: from live steps, and from measurements of its own when it is idle. Pure:
times are passed in.

What a peer can do is told, not what is asked of it: throughput is tokens per second *of computing*, so that a peer that
is busy for a tenth of the time at 5 tokens per second is good for 50.
"""

from __future__ import annotations

from dataclasses import dataclass

NEWEST_SHARE = 0.1  # of the newest step in the mean
OWN_SHARE = 0.5  # of a measurement of one's own, which is the best of a few steps
OUTLIER = 5.0
"""A step counts as no more than so many times the mean: one that was swapped out for seconds says little."""
QUEUE_HALF_LIFE_S = 10.0
"""Without steps the time that steps wait is forgotten: nobody waits."""


@dataclass(slots=True)
class _Mean:
    """An exponentially weighted mean."""

    value: float | None = None

    def add(self, value: float, share: float) -> None:
        if self.value is None:
            self.value = value
        else:
            self.value += share * (min(value, OUTLIER * max(self.value, 1e-3)) - self.value)


class Meter:
    """The speed of a span.

    Args:
        n_blocks: blocks of the whole span; steps of chains that use fewer are scaled up.

    Attributes:
        steps: passes noted so far.
        tokens: tokens of all rows in them.
    """

    def __init__(self, n_blocks: int) -> None:
        self.steps = 0
        self.tokens = 0
        self.n_blocks = n_blocks
        self._step_ms = _Mean()
        self._token_ms = _Mean()
        self._queue_ms = _Mean()
        self._last_step_s = 0.0
        self._last_s: float | None = None

    def measured(self, step_ms: float, now_s: float) -> None:
        """A measurement of one's own: one token of one row through the whole span took `step_ms`."""
        before = self._step_ms.value
        self._step_ms.add(step_ms, OWN_SHARE)
        if before is None or self._token_ms.value is None:
            self._token_ms.add(step_ms, OWN_SHARE)
        elif self._step_ms.value is not None:  # many rows at once do better than one; how much better stays
            self._token_ms.value *= self._step_ms.value / max(before, 1e-3)
        self._last_s = now_s

    def note(self, blocks: int, tokens: int, rows: int, queue_ms: float, compute_ms: float, now_s: float) -> None:
        """A step of a session was computed.

        Prefills and other steps of several tokens say nothing of how fast tokens are decoded, which is what is told.

        Args:
            blocks: how many blocks of the span its chain uses.
            tokens: per row.
            queue_ms: how long it waited.
            compute_ms: how long it took after that.
        """
        self.steps += 1
        self.tokens += tokens * rows
        self._last_s = self._last_step_s = now_s
        self._queue_ms.add(queue_ms, NEWEST_SHARE)
        if tokens == 1:
            whole_ms = compute_ms * self.n_blocks / blocks
            self._token_ms.add(whole_ms / rows, NEWEST_SHARE)
            if rows == 1:
                self._step_ms.add(whole_ms, NEWEST_SHARE)

    @property
    def step_ms(self) -> float | None:
        """Milliseconds that one token of one row takes through the whole span; None: nothing was measured."""
        return self._step_ms.value

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens that all sessions together can decode through the whole span in a second of computing."""
        token_ms = self._token_ms.value
        return None if token_ms is None else 1000.0 / max(token_ms, 1e-3)

    def queue_ms(self, now_s: float) -> float | None:
        """Milliseconds that a step waits before it is computed; None: there were no steps yet."""
        queue_ms = self._queue_ms.value
        return None if queue_ms is None else queue_ms * 0.5 ** ((now_s - self._last_step_s) / QUEUE_HALF_LIFE_S)

    def idle_s(self, now_s: float) -> float:
        """Seconds since the last step or measurement."""
        return float("inf") if self._last_s is None else now_s - self._last_s
