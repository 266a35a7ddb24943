"""A small swarm in this process: real DHT nodes, real gRPC servers that answer pings, and the health page over them.

No model is loaded: what a peer serves is only said. `with world(folder) as found:` runs it all in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from dashboard.config import DashboardConfig
from dashboard.server import open_page
from dashboard.watch import Watch
from dht.announcer import Announcer, announcing
from dht.config import DhtConfig
from dht.node import SwarmNode, open_node
from dht.record import ModelRecord, PeerRecord
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import server_credentials, server_options
from protocol.identity import Identity
from protocol.limits import MESSAGE_BYTES, WIRE_VERSION
from protocol.loop import new_event_loop
from protocol.span import Span
from tests.dashboard.support import HOSTILE, MODEL

Result = TypeVar("Result")

MODEL_NAME = "potluck-demo"
N_BLOCKS = 24
PEERS = (("Zoë's laptop", "0:12"), ("attic", "0:12"), (HOSTILE, "12:24"), ("", "16:24"))
"""Public names and spans; only the third serves 12:16."""
CALL_S = 30.0


class _Pings(pb_grpc.PeerServicer):
    async def Ping(self, request: pb.PingRequest, context: Any) -> pb.PingReply:  # noqa: N802
        return pb.PingReply(payload=request.payload)


class Peer:
    """One peer. For the world's loop."""

    def __init__(self, identity: Identity, name: str, span: str) -> None:
        self.identity = identity
        self.announcer: Announcer | None = None
        self._name, self._span, self._started_at = name, Span.parse(span), time.time() - 7200
        self._server: grpc.aio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        """Answers; where it did before, if it did."""
        self._server = grpc.aio.server(options=server_options(MESSAGE_BYTES))
        pb_grpc.add_PeerServicer_to_server(_Pings(), self._server)  # type: ignore[no-untyped-call]  # generated
        credentials = server_credentials(self.identity)
        self._port = self._server.add_secure_port(f"127.0.0.1:{self._port}", credentials)
        await self._server.start()

    async def kill(self) -> None:
        """Answers no more, and tells nobody."""
        assert self._server is not None
        await self._server.stop(0)

    def record(self) -> PeerRecord:
        return PeerRecord(
            peer_id=self.identity.peer_id,
            fingerprint=MODEL,
            n_blocks=N_BLOCKS,
            span=self._span,
            state="online",
            addresses=(f"127.0.0.1:{self._port}",),
            certificate_der=self.identity.certificate_der,
            step_ms=1.1 * len(self._span),
            queue_ms=0.4,
            tokens_per_s=41.0,
            kv_tokens_left=45_000,
            kv_tokens_total=65_536,
            tokens_served=1_234_567,
            dtype="bfloat16",
            software="potluck/0.1.0",
            wire_version=WIRE_VERSION,
            public_name=self._name,
            contact="zoe@example.org" if self._name else "",
            started_at=self._started_at,
        )


class World:
    """The running swarm and its page. Made by `world`.

    Attributes:
        url: of the page.
        maddr: where others join the swarm.
        peers: in order of `PEERS`.
    """

    def __init__(self, folder: Path, peers: tuple[tuple[str, str], ...]) -> None:
        self.url = self.maddr = ""
        self.peers: list[Peer] = []
        self.watch: Watch | None = None
        self._folder, self._names = folder, peers
        self._ready: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="world")

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs it in the world's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        dht_config = DhtConfig(
            host="127.0.0.1", home=str(self._folder), lan=False, local=False, refresh_every_s=1.0, reconnect_every_s=1.0
        )
        async with contextlib.AsyncExitStack() as stack:
            nodes: list[SwarmNode] = []
            for name, span in self._names:
                peer = Peer(Identity.ephemeral(), name, span)
                joined = nodes[0].maddrs[:1] if nodes else ()
                nodes.append(await stack.enter_async_context(open_node(dht_config, peer.identity, joined)))
                await stack.enter_async_context(_serving(peer, nodes[-1]))
                self.peers.append(peer)
            self.maddr = nodes[0].maddrs[0]
            config = DashboardConfig(join=(self.maddr,), port=0, sample_every_s=1.0, title="Potluck")
            page = open_page(config, replace(dht_config, join=config.join))
            self.url, self.watch = await stack.enter_async_context(page)
            self._ready.set_result(None)
            await self._stop.wait()

    def start(self) -> None:
        self._thread.start()
        self._ready.result(CALL_S)

    def stop(self) -> None:
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@contextlib.asynccontextmanager
async def _serving(peer: Peer, node: SwarmNode) -> AsyncIterator[None]:
    await peer.start()
    listing = ModelRecord("", MODEL_NAME, MODEL, N_BLOCKS)
    try:
        async with announcing(node, peer.record, listing) as peer.announcer:
            yield
    finally:
        await peer.kill()


@contextlib.contextmanager
def world(folder: Path, peers: tuple[tuple[str, str], ...] = PEERS) -> Iterator[World]:
    """A swarm and its page, until the context ends."""
    found = World(folder, peers)
    found.start()
    try:
        yield found
    finally:
        found.stop()
