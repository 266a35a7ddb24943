"""Waiting on conditions, never for luck."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAIT_S = 20.0


async def until(holds: Callable[[], bool], what: str = "what a test waits for") -> None:
    """Returns once it does.

    Raises:
        AssertionError: it did not, for `WAIT_S`.
    """
    try:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S:g} s in vain for {what}") from None
