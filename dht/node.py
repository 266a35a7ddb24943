"""One DHT node inside our own event loop: hivemind's `DHTNode` and its p2pd daemon, started, watched and ended here.

Nothing is forked: hivemind's usual `DHT` class runs a forked process, which gRPC does not survive. p2pd is a child
process; it is ended with the context, restarted if it dies, and ends by itself when this process is killed.
Importing this module imports hivemind, and with it torch (about 1.5 s); all other modules of `dht` stay light.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import hivemind.utils.logging as hivemind_logging
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import dht_pb2
from hivemind.utils.multiaddr import Multiaddr

from dht import known_peers, ports
from dht.background import background
from dht.config import DhtConfig
from dht.maddr import Maddr, best_first, transport
from dht.probe import listens
from dht.validator import PotluckValidator, Verifier, guard
from protocol.errors import ConfigError, SwarmNotFound
from protocol.identity import Identity

log = logging.getLogger(__name__)

MAX_CLOCK_SKEW_S = 3.0
"""hivemind's own bound: further apart, nodes refuse or forget each other's records."""
MAX_LEARNED = 64
FEW_NEIGHBOURS = 3
PORT_ATTEMPTS = 3


class SwarmNode:
    """A running node. Made by `open_node`; all methods are for the loop in which it was opened.

    Attributes:
        identity: None for a client.
        peer_id: this node's id in libp2p, base58.
        maddrs: under which addresses others join through this node, best first; empty for a client.
        verifier: shared with readers, so that each record's signature is checked once.
        refused: records that this node did not store or believe, by reason; readers take and clear it.
    """

    def __init__(self, config: DhtConfig, identity: Identity | None, initial: Sequence[Maddr]) -> None:
        self.config = config
        self.identity = identity
        self.peer_id = ""
        self.maddrs: tuple[str, ...] = ()
        self.verifier = Verifier()
        self.refused: Counter[str] = Counter()
        self._daemon: _Daemon | None = None
        self._initial = {maddr.peer_id: maddr for maddr in initial}
        self._learned: dict[str, Maddr] = {}
        self._remembered: set[str] = set()
        self._key_path: Path | None = None

    @property
    def neighbours(self) -> int:
        """How many other nodes are in the routing table."""
        return 0 if self._daemon is None else len(self._daemon.table.uid_to_peer_id)

    @property
    def met(self) -> tuple[str, ...]:
        """Addresses of the other nodes that are in the routing table now: worth trying after a restart."""
        if self._daemon is None:
            return ()
        known = {**self._initial, **self._learned}
        return tuple(str(maddr) for maddr in known.values() if PeerID.from_base58(maddr.peer_id) in self._daemon.table)

    def now(self) -> float:
        """Seconds since 1970, the time that all nodes of a swarm share."""
        return time.time()

    def learn(self, peer_id: str, maddrs: Iterable[str]) -> None:
        """Remember another node (from its own record), to come back through it when the others are gone."""
        found = [maddr for text in maddrs if (maddr := Maddr.parse(text)) is not None and maddr.peer_id == peer_id]
        if found and peer_id != self.peer_id and (peer_id in self._learned or len(self._learned) < MAX_LEARNED):
            self._learned[peer_id] = found[0]

    async def store(self, key: str, value: bytes, expires_at: float) -> bool:
        """Publish a sealed record under this node's identity. False: no node took it, or not in time."""
        if self._daemon is None:
            return False
        try:
            async with asyncio.timeout(self.config.store_timeout_s):
                return bool(await self._daemon.dht.store(key, value, expires_at, subkey=self.peer_id))
        except Exception as error:  # noqa: BLE001  # hivemind raises anything when its daemon is gone
            log.debug("storing %s failed: %r", key, error)
            return False

    async def read(self, keys: Sequence[str]) -> dict[str, dict[str, bytes]]:
        """All current records under each key, by subkey: raw, as other nodes sent them.

        Raises:
            SwarmNotFound: no answer within `read_timeout_s`, or the daemon failed.
        """
        if self._daemon is None:
            raise SwarmNotFound("the DHT node is being restarted", retryable=True)
        try:
            async with asyncio.timeout(self.config.read_timeout_s):
                # One search per key: several large keys in one answer could exceed what the daemon passes.
                found = await asyncio.gather(*(self._daemon.dht.get(key, latest=True) for key in keys))
        except TimeoutError:
            raise SwarmNotFound(
                f"the swarm did not answer within {self.config.read_timeout_s:g} s", retryable=True
            ) from None
        except Exception as error:  # noqa: BLE001  # as above
            raise SwarmNotFound(f"the swarm cannot be read: {error!r}", retryable=True) from None
        return {key: _subkeys(result) for key, result in zip(keys, found, strict=True)}

    async def open(self, key_path: Path | None) -> None:
        """Start and join. For `open_node` only, as the next two."""
        self._key_path = key_path
        await self._start(list(self._initial.values()))
        if self._initial:
            offsets = await self._running.clock_offsets(self._initial, self.config.rpc_timeout_s)
            _check_joined(offsets, list(self._initial.values()))

    async def close(self) -> None:
        """Leave and end the daemon."""
        await self._remember()
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            await daemon.end(self.config.stop_timeout_s)

    async def tend(self) -> None:
        """Restart the daemon when it dies; keep in touch with other nodes, so that no restart splits the swarm."""
        while True:
            if await self._running.wait_for_end(self.config.reconnect_every_s):
                log.warning("the DHT daemon ended unexpectedly; starting it again")
                await self._restart()
            visits = (self._running.visit(maddr, self.config.rpc_timeout_s) for maddr in self._to_visit())
            await asyncio.gather(*visits)
            await self._remember()

    async def _remember(self) -> None:
        met = self.met
        if set(met) - self._remembered:
            self._remembered = set(met)
            await asyncio.to_thread(known_peers.remember, self.config.home_folder, met, self.now())

    @property
    def _running(self) -> _Daemon:
        if self._daemon is None:
            raise SwarmNotFound("the DHT node is being restarted", retryable=True)
        return self._daemon

    async def _start(self, nearby: Sequence[Maddr]) -> None:
        validator = PotluckValidator(self.verifier, self.now, self.refused)
        self._daemon = await _start_daemon(self.config, self.identity, self._key_path, nearby, validator)
        self.peer_id, self.maddrs = self._daemon.peer_id, self._daemon.maddrs

    async def _restart(self) -> None:
        await self.close()
        nearby = list({**self._learned, **self._initial}.values())
        while self._daemon is None:
            try:
                await self._start(nearby)
            except SwarmNotFound:
                nearby = []  # start alone, as the first node does; `tend` visits the others when they are back
            except ConfigError as error:
                log.warning("the DHT daemon did not start: %s", error)
                await asyncio.sleep(self.config.reconnect_every_s)

    def _to_visit(self) -> list[Maddr]:
        """The nodes through which we joined, always: one that restarted knows nobody. Others when we know few."""
        nodes = {**self._learned, **self._initial} if self.neighbours < FEW_NEIGHBOURS else self._initial
        return []


@contextlib.asynccontextmanager
async def open_node(
    config: DhtConfig, identity: Identity | None = None, initial_peers: Sequence[str] = ()
) -> AsyncIterator[SwarmNode]:
    """A node of the swarm that `initial_peers` (multiaddrs) belong to; without any, the first node of a new swarm.

    Without an identity the node is a client: it listens nowhere, stores nothing for others, and cannot announce.

    Raises:
        ConfigError: the port is taken, the host is no address of this machine, or a multiaddr is malformed.
        SwarmNotFound: none of `initial_peers` answers, or this machine's clock is off.
    """
    tame_hivemind_logs()
    node = SwarmNode(config, identity, [Maddr.require(text) for text in initial_peers])
    with identity.key_file() if identity is not None else contextlib.nullcontext() as key_path:
        try:
            await node.open(key_path)
            async with background(node.tend(), "dht-node"):
                yield node
        finally:
            await node.close()


class _Daemon:
    """A p2pd child with the `DHTNode` that speaks through it. Uses some of hivemind's private attributes."""

    def __init__(self, p2p: P2P, dht: DHTNode, maddrs: tuple[str, ...]) -> None:
        self._p2p = p2p
        self.dht = dht
        self.peer_id: str = dht.peer_id.to_base58()
        self.maddrs = maddrs

    @property
    def table(self) -> Any:
        """hivemind's routing table."""
        return self.dht.protocol.routing_table

    async def clock_offsets(self, nodes: Iterable[str], timeout_s: float) -> list[float]:
        """Of the nodes that answer: how many seconds their clocks are ahead of ours, at least (0 within doubt)."""

        async def one(peer_id: str) -> float | None:
            request = dht_pb2.PingRequest(peer=self.dht.protocol.node_info)
            sent = local_time()
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await self.dht.protocol.get_stub(PeerID.from_base58(peer_id)).rpc_ping(request)
            except Exception as error:  # noqa: BLE001  # a node that cannot be asked has no offset
                log.debug("%s does not answer: %r", peer_id, error)
                return None
            theirs = float(answer.dht_time)
            return min(0.0, theirs - sent) or max(0.0, theirs - local_time())

        offsets = await asyncio.gather(*(one(peer_id) for peer_id in nodes))
        return [offset for offset in offsets if offset is not None]

    async def visit(self, maddr: Maddr, timeout_s: float) -> None:
        """Connect to a node and get into its routing table, and it into ours."""
        if not await listens(maddr, timeout_s):
            return  # p2pd would wait longer after each failed dial, up to 5 minutes, also when the node is back
        peer = PeerID.from_base58(maddr.peer_id)
        try:
            async with asyncio.timeout(timeout_s):
                await self._p2p._client.connect(peer, [Multiaddr(maddr.transport)])
                await self.dht.protocol.call_ping(peer)
        except Exception as error:  # noqa: BLE001  # it is still gone
            log.debug("%s cannot be reached: %r", maddr, error)

    async def wait_for_end(self, timeout_s: float) -> bool:
        """Has the child process ended, after at most `timeout_s`?"""
        try:
            async with asyncio.timeout(timeout_s):
                await self._p2p._child.wait()
        except TimeoutError:
            return False
        return True

    async def end(self, timeout_s: float) -> None:
        """Leave the DHT and end the child, by force if need be."""
        try:
            async with asyncio.timeout(timeout_s if self._p2p._child.returncode is None else 0):
                await self.dht.shutdown()
        except Exception as error:  # noqa: BLE001  # a dead daemon cannot be asked to remove handlers
            log.debug("leaving the DHT: %r", error)
        finally:
            if self.dht.cache_refresh_task is not None:
                self.dht.cache_refresh_task.cancel()
            await _end_p2pd(self._p2p, timeout_s)


async def _start_daemon(
    config: DhtConfig,
    identity: Identity | None,
    key_path: Path | None,
    initial: Sequence[Maddr],
    validator: PotluckValidator,
) -> _Daemon:
    texts = [str(maddr) for maddr in initial]
    p2p = await _start_p2pd(config, identity, key_path, texts)
    try:
        async with asyncio.timeout(config.join_timeout_s):
            dht = await DHTNode.create(
                p2p=p2p,
                # The same place in the key space after a restart: what it should hold is soon there again.
                node_id=DHTID.generate(source=p2p.peer_id.to_base58()),
                initial_peers=texts or None,
                client_mode=identity is None,
                num_replicas=config.replicas,
                wait_timeout=config.rpc_timeout_s,
                record_validator=validator,
                ensure_bootstrap_success=False,  # `_check_joined` tells the causes apart
                # Caches would show old records, and grow: every read here is a full one.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                cache_size=1,
                reuse_get_requests=False,
            )
        guard(dht.protocol)
        maddrs = () if identity is None else best_first(str(m) for m in await p2p.get_visible_maddrs(latest=True))
    except BaseException as error:
        await _end_p2pd(p2p, config.stop_timeout_s)
        if isinstance(error, TimeoutError):
            raise SwarmNotFound(f"the swarm did not let this node in within {config.join_timeout_s:g} s") from None
        raise
    return _Daemon(p2p, dht, maddrs)


async def _start_p2pd(config: DhtConfig, identity: Identity | None, key_path: Path | None, initial: list[str]) -> P2P:
    for attempt in range(PORT_ATTEMPTS):
        listening: dict[str, Any] = {"host_maddrs": None, "no_listen": True, "dht_mode": "client"}
        port = 0
        if identity is not None:
            port = ports.choose(config, identity.folder if attempt == 0 else None)
            announced = None if config.announce_host is None else [transport(config.announce_host, port)]
            listening = {"host_maddrs": [transport(config.host, port)], "announce_maddrs": announced}
        try:
            p2p = await _create_p2p(
                config.stop_timeout_s,
                initial_peers=initial or None,
                identity_path=None if key_path is None else str(key_path),
                check_if_identity_free=False,  # `claim_identity` sees to that, without a second daemon
                startup_timeout=config.start_timeout_s,
                idle_timeout=config.start_timeout_s,
                auto_nat=False,
                nat_port_map=False,
                use_relay=False,
                **listening,
            )
        except (P2PDaemonError, ControlFailure, OSError) as error:
            if initial and any(words in str(error) for words in ("bootstrap", "failed to start in")):
                raise _unreachable(initial) from None
            if "listen" in str(error) and config.port == 0 and attempt + 1 < PORT_ATTEMPTS:
                continue  # someone took the port between our look and the daemon's
            raise ConfigError(f"the DHT daemon did not start: {error}") from None
        if identity is not None and identity.folder is not None:
            await asyncio.to_thread(ports.remember, identity.folder, port)
        return p2p
    raise ConfigError(f"no free port was found on {config.host}")


async def _create_p2p(stop_timeout_s: float, **arguments: Any) -> P2P:
    """`P2P.create`, but the child is ended also when the start fails or is cancelled half-way."""
    made: list[P2P] = []

    class Tracked(P2P):  # type: ignore[misc]  # hivemind has no types
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    try:
        return await Tracked.create(**arguments)
    except BaseException:
        for p2p in made:
            await _end_p2pd(p2p, stop_timeout_s)
        raise


async def _end_p2pd(p2p: P2P, timeout_s: float) -> None:
    """SIGTERM, wait, and SIGKILL if that did not do. Leaves none of hivemind's tasks behind."""
    child = p2p._child
    p2p._terminate()  # synchronous: the child is told to end even if this task is cancelled again
    if child is None:
        return
    try:
        async with asyncio.timeout(timeout_s):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()
    control = None if p2p._client is None else p2p._client.control
    tasks = [p2p._reader_task, p2p._listen_task]
    if control is not None:
        tasks += [control._read_task, control._write_task, *control._handler_tasks.values()]
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    if running:
        done, _ = await asyncio.wait(running, timeout=timeout_s)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.debug("hivemind's %s ended with %r", task.get_name(), error)  # else asyncio logs a traceback


def _check_joined(offsets: list[float], initial: Sequence[Maddr]) -> None:
    if not offsets:
        raise _unreachable([str(maddr) for maddr in initial])
    skew = statistics.median(offsets)
    if abs(skew) > MAX_CLOCK_SKEW_S:
        raise SwarmNotFound(
            f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the swarm's, "
            f"and records expire by the clock; synchronise it (e.g. `timedatectl set-ntp true`) and try again"
        )


def _unreachable(initial: Sequence[str]) -> SwarmNotFound:
    return SwarmNotFound(
        f"no node of the swarm answers at {', '.join(initial)}; check that one runs there and that the address is right"
    )


def _subkeys(result: Any) -> dict[str, bytes]:
    if result is None or not isinstance(result.value, dict):
        return {}
    return {
        subkey: item.value
        for subkey, item in result.value.items()
        if isinstance(subkey, str) and isinstance(item.value, bytes)
    }


def local_time() -> float:
    """This machine's clock, as it is compared with the swarm's."""
    return time.time()


def tame_hivemind_logs() -> None:
    """hivemind's messages go through our logging, and only errors, unless debugging is on."""
    hivemind_logging.use_hivemind_log_handler("nowhere")
    debugging = logging.getLogger().isEnabledFor(logging.DEBUG)
    logging.getLogger("hivemind").setLevel(logging.DEBUG if debugging else logging.ERROR)
