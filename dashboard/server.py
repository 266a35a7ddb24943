"""Puts the health page together: the history, the watch over the swarm, and a web server that notes no addresses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn

from dashboard.app import Site
from dashboard.config import DashboardConfig
from dashboard.history import open_history
from dashboard.watch import Watch, watching
from dht import ports
from dht.config import DhtConfig
from protocol.hosts import address, own_host

HISTORY_FILE = "dashboard.sqlite3"
LOOK_EVERY_S = 0.02


class _Server(uvicorn.Server):
    """Signals are the command line's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def open_page(config: DashboardConfig, dht_config: DhtConfig) -> AsyncIterator[tuple[str, Watch]]:
    """The page, served while the body runs. Gives its URL, and the watch.

    Raises:
        ConfigError: the port is taken, an address is malformed, or the history cannot be used.
    """
    port = ports.bind(config.host, config.port)
    path = _history_file(config, dht_config)
    async with open_history(path, config.keep_days) as history, watching(config, dht_config, history) as watch:
        server = _Server(
            uvicorn.Config(
                Site(config, watch, history).app(),
                host=config.host,
                port=port,
                access_log=False,  # it would note the addresses of readers
                http="h11",
                lifespan="off",
                log_config=None,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=round(config.stop_timeout_s),
                ws="none",
            )
        )
        serving = asyncio.create_task(server.serve(), name="web-server")
        try:
            while not server.started and not serving.done():  # noqa: ASYNC110  # uvicorn tells nobody
                await asyncio.sleep(LOOK_EVERY_S)
            yield _url(config.host, port), watch
        finally:
            await watch.close()
            server.should_exit = True
            await serving


def _history_file(config: DashboardConfig, dht_config: DhtConfig) -> Path:
    return Path(config.history).expanduser() if config.history else dht_config.home_folder / HISTORY_FILE


def _url(host: str, port: int) -> str:
    return f"http://{address(own_host(host), port)}/"
