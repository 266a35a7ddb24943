"""A client's connection to a swarm: its DHT node, its view of the peers, its channels, in an event loop of its own.

`Swarm.connect` starts a thread with the loop; the rest of the program is ordinary blocking code (Hugging Face's
`generate` is), and hands coroutines over with `call`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

from client.blame import Blame
from client.channels import CLOSE_TIMEOUT_S, Channels
from client.config import ClientConfig
from client.peers import ModelPeers
from client.pinger import Pinger
from client.times import Stopwatch
from dht.background import background
from dht.config import DhtConfig
from dht.locate import locate_swarm
from dht.node import open_node
from dht.record import PeerRecord
from dht.view import SwarmReader, SwarmView, reading
from protocol.credentials import ClientKey, Credentials
from protocol.errors import PotluckError, SwarmNotFound, UnknownModel
from protocol.join_token import read_join_token
from protocol.loop import new_event_loop
from protocol.messages import Open
from protocol.settings import load

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class Closable(Protocol):
    """A session, as far as closing it is concerned."""

    async def close(self) -> None: ...


class Swarm:
    """A joined swarm. Make one with `connect`; `close` it, or use it as a context manager."""

    def __init__(self, config: ClientConfig) -> None:
        self.blame = Blame(config.avoid_s)
        self._credentials: Credentials | None = None
        self.stopwatch = Stopwatch()
        self._config = config
        self._reader: SwarmReader | None = None
        self._watched: set[str] = set()  # fingerprints of the models in use
        self.channels = Channels(direct=config.direct)
        self._pinger = Pinger(self.stopwatch, self.channels.lent, self._watched_peers, config.refresh_s)
        self._closing: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._closed = False
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="potluck-swarm", daemon=True)

    @classmethod
    def connect(cls, config: ClientConfig) -> Swarm:
        """Finds and joins the swarm that `config` names, or the one that can be found.

        Raises:
            SwarmNotFound: there is none, or it does not answer.
            ConfigError: an address is malformed.
        """
        swarm = cls.begin(config)
        try:
            return swarm.joined()
        except BaseException:
            swarm.close()
            raise

    @classmethod
    def begin(cls, config: ClientConfig) -> Swarm:
        """As `connect`, without waiting: of use once it has `joined`, to be closed in any case."""
        swarm = cls(config)
        swarm._thread.start()
        return swarm

    def joined(self) -> Swarm:
        """Itself, in the swarm. Waits.

        Raises:
            As `connect`.
        """
        self._ready.result()
        return self

    # ------------------------------------------------------------------ for blocking callers

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs `work` in the swarm's loop and waits for it. An interrupt of the caller cancels the work.

        Raises:
            SwarmNotFound: the swarm was closed.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            work.close()
            raise SwarmNotFound("this swarm connection was closed")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Has the swarm's loop call it; from any thread, never waits. Nothing, once the swarm was closed."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function)

    def close_later(self, session: Closable) -> None:
        """Frees a session's memory on its peers soon; from any thread, never waits, never raises."""
        self.call_soon(partial(self._begin_close, session))

    def close(self) -> None:
        """Leaves the swarm: ends sessions' streams, the DHT node and the thread. Should it still be joining, waits for
        that first."""
        self._closed = True
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def view(self) -> SwarmView:
        """Who serves what, as last seen."""
        assert self._reader is not None
        return self._reader.view

    def refresh(self) -> SwarmView:
        """Looks again, now."""
        assert self._reader is not None
        return self.call(self._reader.refresh())

    def only_model(self) -> str:
        """The name of the one model that this swarm serves.

        Raises:
            UnknownModel: it serves none, or several: one must be named.
        """
        names = sorted({model.name for model in self.view.models})
        if len(names) == 1:
            return names[0]
        if not names:
            raise UnknownModel(
                "this swarm serves no model that this client sees; start a peer, or, if the swarm is private, give its "
                "join token (--join-token)"
            )
        raise UnknownModel(f"this swarm serves {', '.join(names)}; name one of them with --model")

    def peers_of(self, fingerprint: str) -> ModelPeers:
        """The peers of one model, and channels to them. Waits up to a second, once, for round trips to them."""
        assert self._reader is not None
        peers = ModelPeers(self, fingerprint)
        if fingerprint not in self._watched:
            self._watched.add(fingerprint)
            self._reader.watch(fingerprint)
            self.call(self._pinger.first(peers.peers(), partial(self.channels.lent, keep=True)))
        return peers

    # ------------------------------------------------------------------ in the loop

    def signed(self, request: Open, peer: PeerRecord) -> Open:
        """The request, as this peer takes it from this client."""
        assert self._credentials is not None, "sessions are opened once the swarm is joined"
        return self._credentials.sign(request, peer.peer_id, time.time())

    async def look_again(self) -> None:
        """Refreshes the view; a swarm that does not answer leaves it as it is."""
        assert self._reader is not None
        try:
            await self._reader.refresh()
        except SwarmNotFound as error:
            logger.warning("%s", error)

    def _watched_peers(self) -> list[PeerRecord]:
        return [peer for fingerprint in list(self._watched) for peer in ModelPeers(self, fingerprint).peers()]

    def _begin_close(self, session: Closable) -> None:
        task = asyncio.ensure_future(session.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            elif not isinstance(error, PotluckError):
                logger.exception("the connection to the swarm failed")
        finally:
            self._loop = None

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        given = {"join": self._config.join, "join_token": self._config.join_token}
        base = load(DhtConfig, given, section="dht")
        self._credentials = await asyncio.to_thread(_credentials, self._config, base)
        located = await locate_swarm(base)
        async with open_node(base, None, located.maddrs) as node, reading(node) as reader:
            self._reader = reader
            self._loop = asyncio.get_running_loop()
            if self._closed:  # looked at only now, when `close` can see the loop
                self._stop.set()
            self._ready.set_result(None)
            async with background(self._pinger.run(), "pinger"), background(self._tidy(), "channels"):
                await self._stop.wait()
            self._loop = None
            await self._disconnect()

    async def _disconnect(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing, timeout=CLOSE_TIMEOUT_S)
        await self.channels.close()

    async def _tidy(self) -> None:
        """Closes the channels to peers that are gone, and does without relays where that goes; for ever."""
        while True:
            await asyncio.sleep(self._config.refresh_s)
            await self.channels.forget_all_but(peer for peers in self.view.peers_by_model.values() for peer in peers)
            await self.channels.go_direct(self._watched_peers())


def _credentials(config: ClientConfig, base: DhtConfig) -> Credentials:
    """With what sessions are opened. Blocks on the disk.

    Raises:
        ConfigError: the kept key is damaged, or the join token has a mistake.
    """
    key = ClientKey.load_or_create(base.home_folder) if config.keep_key else ClientKey.ephemeral()
    return Credentials(key, read_join_token(base.join_token))
