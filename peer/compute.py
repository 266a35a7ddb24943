"""The one thread that owns the device. The event loop hands it work and never computes itself (law 6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class ComputeThread:
    """Runs functions one after the other, in the order they came.

    Args:
        num_threads: torch's threads inside one operation; None leaves torch's own choice.
    """

    def __init__(self, num_threads: int | None) -> None:
        self._executor = ThreadPoolExecutor(1, "compute", initializer=_set_threads, initargs=(num_threads,))
        self.queued = 0  # functions that wait or run

    async def run(self, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs) -> Result:
        """What `function` returns or raises. A caller that is cancelled leaves; the function still runs to its end."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def submit(self, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs) -> Future[Result]:
        """As `run`, for whoever wants to wait later, or to take back what has not begun."""
        self.queued += 1
        future = self._executor.submit(function, *args, **kwargs)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _call_soon(loop, self._ended))
        return future

    def _ended(self) -> None:
        self.queued -= 1

    def close(self) -> None:
        """Lets the running function end, drops the waiting ones."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


def _set_threads(num_threads: int | None) -> None:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
