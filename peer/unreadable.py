"""Bytes that are no message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError


class UnreadableAsEmpty(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Bytes that are no message reach the service as an empty one, to be refused; grpc would log a traceback."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return handler and handler._replace(request_deserializer=_or_empty(handler.request_deserializer))


def _or_empty(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return parse(b"")

    return parsed
