"""The ASGI application: routes, the key, errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from client.api import page
from client.api.chat import chat
from client.api.completions import complete
from client.api.errors import body_of, from_validation, headers_of, http_error, internal_error, status_of
from client.api.gateway import Gateway
from client.api.guard import CLOSED_STATUS, KeyGuard, RequestTimer
from client.api.metrics import CONTENT_TYPE
from client.api.responses import respond
from client.api.schemas import ChatRequest, CompletionRequest, ResponseRequest
from client.api.streaming import ReaderGone
from protocol.errors import BlocksMissing, PotluckError

MOST_BODY_BYTES = 16 << 20  # of a request


def create_app(gateway: Gateway) -> FastAPI:
    """The application around an open gateway, whose answers end with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.answers.close()

    app = FastAPI(
        title="Potluck",
        description="A language model that a swarm serves, behind OpenAI's interface.",
        version=version("potluck"),
        lifespan=lifespan,
        max_body_size=MOST_BODY_BYTES,
    )
    app.add_middleware(KeyGuard, keys=gateway.config.api_key)
    app.add_middleware(RequestTimer, metrics=gateway.metrics)
    _add_errors(app)
    _add_models(app, gateway)
    _add_watching(app, gateway)
    app.router.routes.extend(page.routes())

    @app.post("/v1/chat/completions", tags=["answers"])
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat(gateway, request, body)

    @app.post("/v1/completions", tags=["answers"])
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await complete(gateway, request, body)

    @app.post("/v1/responses", tags=["answers"])
    async def responses(request: Request, body: ResponseRequest) -> Response:
        return await respond(gateway, request, body)

    return app


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    model = {"id": gateway.name, "object": "model", "created": gateway.created, "owned_by": "potluck"}

    @app.get("/v1/models", tags=["models"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def one_model(name: str) -> dict[str, Any]:
        gateway.check_model(name)
        return model


def _add_watching(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", tags=["watching"])
    async def health() -> Response:
        missing = await gateway.missing()
        if not missing:
            return JSONResponse({"status": "ok", "model": gateway.name, "missing": []})
        error = BlocksMissing(f"blocks {', '.join(missing)} have no peer", missing=missing)
        said = {"status": "waiting", "model": gateway.name, "missing": missing, **body_of(error)}
        return JSONResponse(said, status_of(error), headers_of(error))

    @app.get("/metrics", tags=["watching"])
    async def metrics() -> Response:
        return Response(gateway.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(PotluckError)
    async def on_error(request: Request, error: PotluckError) -> Response:
        return JSONResponse(body_of(error), status_of(error), headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        refused = from_validation(error)
        return JSONResponse(body_of(refused), refused.status)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return JSONResponse(http_error(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(ReaderGone)
    async def on_gone(request: Request, error: ReaderGone) -> Response:
        return Response(status_code=CLOSED_STATUS)  # nobody reads it

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> Response:
        return JSONResponse(internal_error(), 500)
