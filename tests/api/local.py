"""The gateway over peers in this process: real gRPC, real HTTP, and a view of the swarm without a DHT."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import httpx2
import openai
import uvicorn

from client.api.app import create_app
from client.api.config import ApiConfig
from client.api.gateway import Gateway, open_gateway
from client.config import ClientConfig
from client.model import SwarmModelForCausalLM
from client.swarm import Swarm
from dht.record import ModelRecord
from dht.view import SwarmView
from peer.host import SpanHost
from protocol.credentials import ClientKey, Credentials
from protocol.span import Span
from slicing import resolve
from tests.harness import open_host, record_of
from tests.processes import until

DEMO = "potluck-demo"
# Rounding alone tells answers beside others from those alone; with int8 it is a step of 1/127 now and then.
CLIENT = ClientConfig(wait_s=20.0, avoid_s=5.0, model=DEMO, codec="none", audit=0.0)
MANY_TOKENS = 1 << 16


class Reader:
    """A view of the hosts that are open."""

    def __init__(self, hosts: Sequence[SpanHost]) -> None:
        self.hosts = list(hosts)

    @property
    def view(self) -> SwarmView:
        if not self.hosts:
            return SwarmView()
        served = self.hosts[0].served
        return SwarmView(
            models=(ModelRecord("", DEMO, served.fingerprint, served.n_blocks),),
            peers_by_model=MappingProxyType({served.fingerprint: tuple(record_of(host) for host in self.hosts)}),
        )

    async def refresh(self) -> SwarmView:
        return self.view

    def watch(self, fingerprint: str) -> None:
        """All is read always."""


@dataclass(eq=False)
class Local:
    """What runs. `hosts` are all that were opened, lost ones too."""

    loop: asyncio.AbstractEventLoop
    hosts: list[SpanHost]
    reader: Reader
    gateway: Gateway
    url: str = ""
    clients: list[Any] = field(default_factory=list)

    def openai(self, **settings: Any) -> openai.OpenAI:
        """The official client; it does not try again by itself."""
        given: dict[str, Any] = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | settings
        self.clients.append(client := openai.OpenAI(**given))
        return client

    def http(self, **settings: Any) -> httpx2.Client:
        self.clients.append(client := httpx2.Client(base_url=self.url, timeout=60.0, **settings))
        return client

    @contextmanager
    def another(self, **settings: Any) -> Iterator[Local]:
        """The same model behind a second gateway with these settings."""
        gateway = open_gateway(self.gateway.model, ApiConfig(**({"port": 0} | settings)))
        running = Local(self.loop, self.hosts, self.reader, gateway)
        with _server(gateway) as running.url:
            try:
                yield running
            finally:
                for client in running.clients:
                    client.close()

    def kill(self, host: SpanHost) -> None:
        """Its streams are reset, its port is closed; the view does not know yet."""
        assert host._server is not None
        asyncio.run_coroutine_threadsafe(host._server.stop(None), self.loop).result()

    def lose(self, host: SpanHost) -> None:
        """It is killed, and the view knows."""
        self.reader.hosts.remove(host)
        self.kill(host)

    @property
    def sessions(self) -> int:
        """Sessions on all peers."""
        return sum(len(host.sessions) for host in self.reader.hosts)

    def settles(self) -> None:
        """Waits until nothing is under way."""
        until(lambda: not self.gateway.answers.open and not self.sessions, "all answers to end", 20.0)


@contextmanager
def local(*spans: str, first_identity: int = 0, client: ClientConfig = CLIENT, **settings: Any) -> Iterator[Local]:
    """Peers of these spans of the demo model, and a gateway with these settings of `ApiConfig`.

    Args:
        client: how the gateway uses the swarm.
        first_identity: of `tests.harness`; peers that live at the same time need different ones.
    """
    config = ApiConfig(**({"port": 0} | settings))
    with _loop() as loop:
        hosts_of = _Hosts(Path(resolve(DEMO).location), spans, first_identity)
        hosts = asyncio.run_coroutine_threadsafe(hosts_of.open(), loop).result()
        reader, swarm = Reader(hosts), Swarm(client)
        swarm._credentials = Credentials(ClientKey.ephemeral())
        swarm._loop, swarm._reader = loop, cast(Any, reader)
        model = SwarmModelForCausalLM.from_pretrained(DEMO, swarm=swarm, config=client)
        running = Local(loop, hosts, reader, open_gateway(model, config))
        try:
            with _server(running.gateway) as running.url:
                yield running
        finally:
            for client in running.clients:
                client.close()
            asyncio.run_coroutine_threadsafe(swarm._disconnect(), loop).result()
            asyncio.run_coroutine_threadsafe(hosts_of.close(), loop).result()


class _Hosts:
    """Peers that are opened and closed by the same task, as their task groups want it.

    Args:
        loads: how each of them loads its blocks, see `tests.harness.open_host`; none: in float32.
    """

    def __init__(
        self, folder: Path, spans: Sequence[str], first_identity: int, loads: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._folder = folder
        self._first_identity = first_identity
        self._spans = spans
        self._loads = loads or [{}] * len(spans)
        self._end = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> list[SpanHost]:
        opened: asyncio.Future[list[SpanHost]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(self._hold(opened))
        return await opened

    async def _hold(self, opened: asyncio.Future[list[SpanHost]]) -> None:
        async with AsyncExitStack() as stack:
            opened.set_result(
                [
                    await stack.enter_async_context(
                        open_host(self._folder, Span.parse(span), index, kv_tokens=MANY_TOKENS, **load)
                    )
                    for index, (span, load) in enumerate(
                        zip(self._spans, self._loads, strict=True), self._first_identity
                    )
                ]
            )
            await self._end.wait()

    async def close(self) -> None:
        self._end.set()
        assert self._task is not None
        await self._task


@contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-peers", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def _server(gateway: Gateway) -> Iterator[str]:
    """The gateway behind a port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(create_app(gateway), log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-http")
        thread.start()
        try:
            until(lambda: server.started, "the HTTP server", 20.0)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
