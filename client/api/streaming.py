"""Server-sent events, and what becomes of an answer whose reader goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from client.api.errors import body_of, internal_error
from protocol.errors import PotluckError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter: nginx, hold nothing back


class ReaderGone(Exception):
    """Whoever asked has closed the connection."""


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event as it travels."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


class Stream(StreamingResponse):
    """A response of events. What goes wrong on the way becomes the last one.

    Args:
        when_over: called when it is over, however that came: the reader may go before the first event.
    """

    def __init__(self, events: AsyncGenerator[bytes], when_over: Callable[[], None]) -> None:
        super().__init__(_guarded(events), media_type="text/event-stream", headers=HEADERS)
        self._when_over = when_over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._when_over()


async def _guarded(events: AsyncGenerator[bytes]) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except PotluckError as error:
            yield event(body_of(error))
        except Exception:
            logger.exception("a stream failed")
            yield event(internal_error())


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when whoever asked goes away.

    Raises:
        ReaderGone: that happened.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ReaderGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
