"""p2pd, the libp2p daemon, and the `DHTNode` that speaks through it: started, asked and ended.

Everything that touches hivemind's private attributes is here. p2pd is a child process: it ends with `Daemon.end`, when
its start fails or is cancelled half-way, and by itself when this process is killed. It ignores SIGINT, so that Ctrl-C
leaves time for a tombstone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dht import ports
from dht.config import DhtConfig
from dht.kademlia import DHTID, P2P, ControlFailure, DHTNode, Multiaddr, P2PDaemonError, PeerID, dht_pb2
from dht.kademlia import logging as hivemind_logging
from dht.maddr import Maddr, best_first, transport
from dht.probe import listens, unreachable
from dht.validator import PotluckValidator, guard
from protocol.errors import ConfigError, SwarmNotFound
from protocol.identity import Identity

log = logging.getLogger(__name__)

PORT_ATTEMPTS = 3


class Daemon:
    """A p2pd child with the `DHTNode` that speaks through it.

    Attributes:
        maddrs: how others reach it; empty for a client.
        verdicts: how often other nodes have `taken` or `refused` records of this one.
    """

    def __init__(self, p2p: P2P, dht: DHTNode, maddrs: tuple[str, ...], verdicts: Counter[str]) -> None:
        self._p2p = p2p
        self.dht = dht
        self.verdicts = verdicts
        self.peer_id: str = dht.peer_id.to_base58()
        self.maddrs = maddrs

    @property
    def neighbours(self) -> int:
        """How many other nodes are in the routing table."""
        return len(self.dht.protocol.routing_table.uid_to_peer_id)

    def knows(self, peer_id: str) -> bool:
        """Is this node in the routing table?"""
        return PeerID.from_base58(peer_id) in self.dht.protocol.routing_table

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


async def start_daemon(
    config: DhtConfig,
    identity: Identity | None,
    key_path: Path | None,
    initial: Sequence[Maddr],
    validator: PotluckValidator,
    *,
    listens: bool,
) -> Daemon:
    """A daemon that has joined through `initial`, or waits for others. Whether anyone answered is not checked here.

    Args:
        listens: others join through it, and it stores for them; else it is a client.

    Raises:
        ConfigError: the port is taken, or the host is no address of this machine.
        SwarmNotFound: p2pd reaches none of `initial`, or the DHT does not let us in within `join_timeout_s`.
    """
    texts = [str(maddr) for maddr in initial]
    p2p = await _start_p2pd(config, identity if listens else None, key_path, texts)
    try:
        async with asyncio.timeout(config.join_timeout_s):
            dht = await DHTNode.create(
                p2p=p2p,
                # The same place in the key space after a restart: what it should hold is soon there again. Not so for
                # a client, which holds nothing: others may remember it as a node at its old place for a while, and
                # hivemind takes offence at being told of itself.
                node_id=DHTID.generate(source=p2p.peer_id.to_base58() if listens else None),
                initial_peers=texts or None,
                client_mode=not listens,
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
        verdicts: Counter[str] = Counter()
        guard(dht.protocol, verdicts)
        maddrs = () if not listens else best_first(str(m) for m in await p2p.get_visible_maddrs(latest=True))
    except BaseException as error:
        await _end_p2pd(p2p, config.stop_timeout_s)
        if isinstance(error, TimeoutError):
            raise SwarmNotFound(f"the swarm did not let this node in within {config.join_timeout_s:g} s") from None
        raise
    return Daemon(p2p, dht, maddrs, verdicts)


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
                raise unreachable(initial) from None
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
            self._daemon_listen_maddr = self._client_listen_maddr = None  # so that it can be ended before it has any
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


def local_time() -> float:
    """This machine's clock, as it is compared with the swarm's."""
    return time.time()


def tame_hivemind_logs() -> None:
    """hivemind's messages go through our logging, and only errors, unless debugging is on."""
    hivemind_logging.use_hivemind_log_handler("nowhere")
    debugging = logging.getLogger().isEnabledFor(logging.DEBUG)
    logging.getLogger("hivemind").setLevel(logging.DEBUG if debugging else logging.ERROR)
