"""What every request passes first: the key, where there is one, and the clock."""

from __future__ import annotations

import base64
import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.api import page
from client.api.errors import BadRequest, body_of
from client.api.metrics import Metrics

OPEN_PATHS = frozenset({"/", "/health", page.ICON})  # the page is the same for all; what it asks for needs the key
OPEN_FOLDERS = (f"{page.MOUNT}/",)
CLOSED_STATUS = 499  # nginx's number for a reader that went away


class KeyGuard:
    """Lets only those in who know a key: as bearer, as OpenAI's clients send it, or as the password of a browser."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not _is_open(scope["path"]):
            headers = Headers(scope=scope)
            given = _key_in(headers.get("authorization", ""))
            if given is None or not self._knows(given):
                await _refusal(headers, is_wrong=given is not None)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        """Takes the same time whatever is given, and whichever key it is."""
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def _key_in(authorization: str) -> bytes | None:
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return None
    return None


def _refusal(headers: Headers, *, is_wrong: bool) -> JSONResponse:
    """A browser that looks at a page is told to ask for the key; programs are not, so that they do not pop up."""
    said = "this API key is not known here" if is_wrong else "this server wants an API key: Authorization: Bearer KEY"
    error = BadRequest(said, reason="invalid_api_key", status=401)
    scheme = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
    return JSONResponse(body_of(error), error.status, {"WWW-Authenticate": f'{scheme} realm="potluck"'})


class RequestTimer:
    """Notes each request, its route, its status and its time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.monotonic(), CLOSED_STATUS

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.note_request(route, status, time.monotonic() - started_s)
