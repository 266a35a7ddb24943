"""The one thread that owns the device. The event loop hands it work and never computes itself (law 6)."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class ComputeThread:
    """Runs functions one after the other, in the order they came. An executor would do, but wakes the event loop three
    times for each.

    Args:
        num_threads: torch's threads inside one operation; None leaves torch's own choice.
    """

    def __init__(self, num_threads: int | None) -> None:
        self.queued = 0  # functions that wait or run
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(num_threads,), name="compute", daemon=True)
        self._thread.start()

    async def run(self, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs) -> Result:
        """What `function` returns or raises. A caller that is cancelled leaves; the function still runs to its end."""
        return await self.submit(function, *args, **kwargs)

    def submit(
        self, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
    ) -> asyncio.Future[Result]:
        """As `run`, for whoever wants to wait later. Dropped if it has not begun when the thread is closed."""
        if self._closed.is_set():
            raise RuntimeError("the compute thread is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def work() -> None:
            error: BaseException | None = None
            result: Any = None
            try:
                result = function(*args, **kwargs)
            except BaseException as raised:  # noqa: BLE001  # for whoever waits
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(partial(self._done, future, result, error))

        self.queued += 1
        self._work.put(work)
        return future

    def _done(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self.queued -= 1
        if future.done():  # its caller has left
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _run(self, num_threads: int | None) -> None:
        _set_threads(num_threads)
        while (work := self._work.get()) is not None:
            if not self._closed.is_set():
                work()
                del work  # it knows a step, which is not to be kept until the next one

    def close(self) -> None:
        """Lets the running function end, drops the waiting ones."""
        self._closed.set()
        self._work.put(None)
        self._thread.join()


def _set_threads(num_threads: int | None) -> None:
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
