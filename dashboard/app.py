"""The web application: a page, a live stream, JSON, metrics. Everything is read-only and open to everybody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dashboard import api, words
from dashboard.config import DashboardConfig
from dashboard.headers import SecurityHeaders
from dashboard.history import DAY_S, History, columns, thinned
from dashboard.metrics import Seen, registry
from dashboard.page import join_command, page
from dashboard.watch import Watch

HERE = Path(__file__).parent
POINTS = 600  # of a chart
GAP_STRETCHES = 3.0  # without a sample are a gap, not a line
HOUR_S = 3600


class Site:
    """What the routes share. `app` makes the application.

    Attributes:
        viewers: open live streams.
    """

    def __init__(self, config: DashboardConfig, watch: Watch, history: History) -> None:
        self.viewers = 0
        self._config = config
        self._watch = watch
        self._history = history
        self._registry = registry(self._seen)
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._live = ""
        self._live_of = (-1, 0)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.index),
                Route("/favicon.ico", self.icon),  # some browsers ask for it before they have read the page
                Route("/health", self.health),
                Route("/metrics", self.metrics),
                Route("/api/v1/", self.api_index),
                Route("/api/v1/swarm", self.api_swarm),
                Route("/api/v1/history", self.api_history),
                Route("/api/v1/events", self.api_events),
                Route("/api/v1/live", self.api_live),
                Mount("/static", StaticFiles(directory=HERE / "static")),
            ],
            middleware=[Middleware(SecurityHeaders), Middleware(GZipMiddleware, minimum_size=1000)],
        )

    # ------------------------------------------------------------------ for people

    async def index(self, request: Request) -> Response:
        """The whole page; it needs no JavaScript."""
        html = self._templates.get_template("page.html").render(title=self._config.title, live=self.live())
        return HTMLResponse(html, headers={"Cache-Control": "no-store"})

    def live(self) -> str:
        """The part of the page that changes, as HTML; made once for all viewers, and anew each minute at least."""
        now = time.time()
        made_of = (self._watch.number, int(now) // 60)
        if made_of != self._live_of:
            health = self._watch.health
            is_stale = 0 < health.as_of < now - self._config.stale_after_s
            shown = page(health, self._watch.recent, now, is_stale=is_stale)
            command = join_command(health, self._config.shown_join)
            self._live = self._templates.get_template("live.html").render(
                page=shown, command=command, knows_address=self._config.shown_join is not None
            )
            self._live_of = made_of
        return self._live

    # ------------------------------------------------------------------ for programs

    async def api_index(self, request: Request) -> Response:
        return JSONResponse(api.INDEX)

    async def api_swarm(self, request: Request) -> Response:
        return JSONResponse(api.swarm(self._watch.health, time.time()))

    async def api_events(self, request: Request) -> Response:
        events = [
            {"at": event.at, "kind": event.kind, "model": words.without_addresses(event.model), "text": event.text}
            for event in self._watch.recent
        ]
        return JSONResponse(events)

    async def api_history(self, request: Request) -> Response:
        """Columns for charts: of the model with `?model=FINGERPRINT`, of the last `?hours=`."""
        now, fingerprint = time.time(), request.query_params.get("model", "")
        try:
            hours = float(request.query_params.get("hours", "24"))
        except ValueError:
            hours = 0.0
        longest = self._config.keep_days * DAY_S / HOUR_S
        if not 0 < hours <= longest:
            return JSONResponse({"error": f"hours is a number above 0 and up to {longest:g}"}, 400)
        stretch_s = max(hours * HOUR_S / POINTS, self._config.sample_every_s)
        samples = await self._history.samples(fingerprint, now - hours * HOUR_S)
        shown = thinned(samples, now, [(hours * HOUR_S, stretch_s)])
        gap_s = GAP_STRETCHES * max(stretch_s, _stretch_s(hours))
        return JSONResponse({"model": fingerprint, "hours": hours, **columns(shown, gap_s)})

    async def api_live(self, request: Request) -> Response:
        if self.viewers >= self._config.max_viewers:
            return PlainTextResponse("too many viewers; load the page again from time to time", 503)
        return StreamingResponse(
            self._stream(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _stream(self) -> AsyncIterator[str]:
        """The changing part whenever it changes; comments in between, so that nobody takes the line for dead."""
        self.viewers += 1
        try:
            number, sent = -1, ""
            while not self._watch.is_closed:
                try:
                    async with asyncio.timeout(self._config.keep_alive_s):
                        number = await self._watch.after(number)
                except TimeoutError:
                    yield ": nothing new\n\n"
                if (html := self.live()) != sent:
                    sent = html
                    yield "".join(f"data: {line}\n" for line in html.splitlines()) + "\n"
        finally:
            self.viewers -= 1

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def icon(self, request: Request) -> Response:
        """The page's, where browsers look for one first."""
        return FileResponse(HERE / "static" / "icon.svg")

    async def health(self, request: Request) -> Response:
        """200: this page sees the swarm; 503: it has not for a while. How the swarm is, is another question."""
        age_s = time.time() - self._watch.health.as_of
        is_fresh = age_s <= self._config.stale_after_s
        said = {
            "status": "ok" if is_fresh else "the swarm is not seen",
            "swarm_complete": self._watch.health.is_complete,
        }
        return JSONResponse(said, 200 if is_fresh else 503, headers={"Cache-Control": "no-store"})

    def _seen(self) -> Seen:
        return Seen(self._watch.health, self._watch.prober.asked, self._watch.dropped, self.viewers)


def _stretch_s(hours: float) -> float:
    """For how long one sample stands at most, that far back."""
    return 30.0 if hours <= 24 else 300.0 if hours <= 7 * 24 else 3600.0
