"""A gauge: what a span can do on this machine, found out by steps that nobody asked for."""

from __future__ import annotations

import asyncio
import time

from peer.compute import ComputeThread
from peer.engine import Engine
from peer.meter import Meter
from slicing import SpanCache, SpanModel

PROBE_TOKENS = 8
FIRST_STEPS = 5
IDLE_S = 30.0  # without a step; then the speed is measured anew
IDLE_LOOK_S = 5.0
IDLE_STEPS = 3


class Gauge:
    """Measures how fast the span is, and gives way to others' steps.

    Args:
        meter: is told.
    """

    def __init__(self, model: SpanModel, engine: Engine, compute: ComputeThread, meter: Meter) -> None:
        self._model = model
        self._engine = engine
        self._compute = compute
        self._meter = meter

    async def measure(self, steps: int = FIRST_STEPS) -> None:
        """One-token steps through the whole span; the best of a few counts."""
        cache = self._model.new_cache()
        best_ms = await self._compute.run(_step_ms, self._model, cache)
        for _ in range(steps - 1):
            if self._is_busy:
                break
            best_ms = min(best_ms, await self._compute.run(_step_ms, self._model, cache))
        self._meter.measured(best_ms, time.monotonic())

    async def run(self) -> None:
        """Measures when there was nothing to do for a while, for ever."""
        while True:
            await asyncio.sleep(IDLE_LOOK_S)
            if self._meter.idle_s(time.monotonic()) >= IDLE_S and not self._is_busy:
                await self.measure(IDLE_STEPS)

    @property
    def _is_busy(self) -> bool:
        return self._engine.queued > 0 or self._compute.queued > 0


def probe_kv_bytes(model: SpanModel) -> int:
    """Bytes of cache per token over the whole span, by running a few tokens."""
    cache = model.new_cache()
    hidden, extras = model.example_inputs(PROBE_TOKENS)
    model.step(hidden, cache, extras=extras)
    return max(1, cache.nbytes() // PROBE_TOKENS)


def _step_ms(model: SpanModel, cache: SpanCache) -> float:
    """Milliseconds of a one-token step."""
    hidden, extras = model.example_inputs(1)
    started_s = time.perf_counter()
    model.step(hidden, cache, extras=extras).cpu()  # a GPU has only been given its orders before
    return (time.perf_counter() - started_s) * 1e3
