"""A server that has the chat page and answers as a test wants: what a real one does seldom, or not twice alike."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from client.api.page import routes

START_S = 10.0
GATE_S = 20.0

GATE = object()
"""In a script: the answer waits until the test says `open_gate`."""

CUT = object()
"""In a script: the connection breaks."""


def hop(peer: str, blocks: str, ms: float | None = None, **more: Any) -> dict[str, Any]:
    parts = {} if ms is None else {"compute_ms": 0.6 * ms, "queue_ms": 0.1 * ms, "network_ms": 0.3 * ms}
    return {"peer_id": f"Qm-{peer}", "name": peer, "blocks": blocks, "ms": ms, "relayed": False, **parts, **more}


def trace(*hops: dict[str, Any], reroutes: int = 0, events: Sequence[str] = ()) -> dict[str, Any]:
    return {"n_blocks": 24, "chain": list(hops), "steps": 1, "reroutes": reroutes, "events": list(events)}


class FakeApi:
    """What the page asks of it.

    Attributes:
        models: that it serves.
        key: that it wants; None: none.
        script: of the next answers: texts, traces (`potluck` of a chunk), errors to be told (`Exception`), pauses in
            seconds, GATE and CUT. An answer that begins with an error is refused with status 503.
        asked: the bodies of requests.
    """

    def __init__(self) -> None:
        self.models = ["potluck-demo"]
        self.key: str | None = None
        self.script: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self._gate = threading.Event()
        self.app = Starlette(
            routes=[
                *routes(),
                Route("/v1/models", self._list),
                Route("/v1/chat/completions", self._answer, methods=["POST"]),
            ]
        )

    def open_gate(self) -> None:
        self._gate.set()

    def reset(self) -> None:
        self._gate.set()  # nobody waits for ever
        self.models, self.key, self.script, self.asked = ["potluck-demo"], None, [], []
        self._gate = threading.Event()
        self.hung_up.clear()

    def _is_refused(self, request: Request) -> bool:
        return self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _list(self, request: Request) -> Response:
        if self._is_refused(request):
            return JSONResponse(_error("no such key"), 401)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _answer(self, request: Request) -> Response:
        self.asked.append(await request.json())
        if self._is_refused(request):
            return JSONResponse(_error("no such key"), 401)
        if self.script and isinstance(self.script[0], Exception):
            return JSONResponse(_error(str(self.script[0])), 503)
        return StreamingResponse(self._stream(self.script, self._gate), media_type="text/event-stream")

    async def _stream(self, script: Sequence[Any], gate: threading.Event) -> AsyncIterator[bytes]:
        is_over = False
        try:
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
            for part in script:
                if part is GATE:
                    deadline_s = time.monotonic() + GATE_S
                    while not gate.is_set() and time.monotonic() < deadline_s:
                        yield b": alive\n\n"
                        await asyncio.sleep(0.02)
                elif part is CUT:
                    is_over = True
                    return
                elif isinstance(part, float):
                    await asyncio.sleep(part)
                elif isinstance(part, Exception):
                    yield _event(_error(str(part)))
                elif isinstance(part, dict):
                    yield _event({"choices": [], "potluck": part})
                else:
                    yield _event({"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]})
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield b"data: [DONE]\n\n"
            is_over = True
        finally:
            if not is_over:
                self.hung_up.set()


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **chunk})}\n\n".encode()


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The app behind a port of loopback; its address."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + START_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline_s, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
