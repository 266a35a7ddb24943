"""The chat page: plain files that speak to the API of the same server, and to nobody else."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
ICON = "/favicon.ico"  # some browsers ask for it before they have read the page, which names another place
MOUNT = "/page"  # where the files are; `index.html` names them relative to itself

# A model's words are a stranger's. Should one get through as markup, nothing of it runs, and nothing is fetched for it.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asks whether it has changed, so that an upgrade is seen at once
}


def routes() -> list[BaseRoute]:
    """The page at `/`, and its files. No secrets are in them: they are to be served without a key."""
    return [Route("/", _index), Route(ICON, _icon), Mount(MOUNT, _Files(directory=FOLDER))]


async def _index(request: Request) -> Response:
    return FileResponse(FOLDER / "index.html", headers=HEADERS)


async def _icon(request: Request) -> Response:
    return FileResponse(FOLDER / "icon.svg", headers=HEADERS)


class _Files(StaticFiles):
    """The page's files, with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
