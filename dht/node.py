"""This process's node of the swarm's DHT, inside our own event loop.

Nothing is forked: hivemind's usual `DHT` class runs a forked process, which gRPC does not survive. The daemon below it
is watched, and started again if it dies.
Importing this module imports hivemind (0.2 s), without torch; all other modules of `dht` stay light.
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

from dht import known_peers
from dht.background import background
from dht.config import DhtConfig
from dht.daemon import Daemon, start_daemon, tame_hivemind_logs
from dht.maddr import Maddr
from dht.probe import unreachable
from dht.validator import PotluckValidator, Verifier
from protocol.errors import ClockOff, ConfigError, SwarmNotFound
from protocol.identity import Identity
from protocol.join_token import JoinToken, read_join_token

log = logging.getLogger(__name__)

MAX_CLOCK_SKEW_S = 3.0
"""hivemind's own bound: further apart, nodes refuse or forget each other's records."""
MAX_LEARNED = 64
FEW_NEIGHBOURS = 3


class SwarmNode:
    """A running node. Made by `open_node`; all methods are for the loop in which it was opened.

    Attributes:
        identity: None for a client.
        peer_id: this node's id in libp2p, base58.
        maddrs: under which addresses others join through this node, best first; empty for a client.
        verifier: shared with readers, so that each record's signature is checked once.
        clock_offset_s: how far the swarm's clock was ahead of ours when we joined, at least; None: nobody was there.
        refused: records that this node did not store or believe, by reason; readers take and clear it.
        swarm: by which a private swarm is told from others; empty: an open one.
    """

    def __init__(
        self,
        config: DhtConfig,
        identity: Identity | None,
        initial: Sequence[Maddr],
        token: JoinToken | None = None,
    ) -> None:
        self.config = config
        self.swarm = "" if token is None else token.name
        self.identity = identity
        self.peer_id = ""
        self.maddrs: tuple[str, ...] = ()
        self.verifier = Verifier(token=token)
        self.refused: Counter[str] = Counter()
        self.clock_offset_s: float | None = None
        self._daemon: Daemon | None = None
        self._initial = {maddr.peer_id: maddr for maddr in initial}
        self._learned: dict[str, Maddr] = {}
        self._remembered: set[str] = set()
        self._is_dialable = self._will_be_dialable = identity is not None
        self._key_path: Path | None = None

    @property
    def neighbours(self) -> int:
        """How many other nodes are in the routing table."""
        return 0 if self._daemon is None else self._daemon.neighbours

    @property
    def met(self) -> tuple[str, ...]:
        """Addresses of the other nodes that are in the routing table now: worth trying after a restart."""
        if self._daemon is None:
            return ()
        known = {**self._initial, **self._learned}
        return tuple(str(maddr) for maddr in known.values() if self._daemon.knows(maddr.peer_id))

    @property
    def is_refused(self) -> bool:
        """Have the nodes of the swarm that this one joined refused all that it published so far?

        Newcomers do not tell whoever began a swarm that it is in the wrong one.
        """
        said: Counter[str] = Counter() if self._daemon is None else self._daemon.verdicts
        return bool(self._initial) and said["refused"] > 0 and not said["taken"]

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
                place, sealed = self.verifier.place(key), self.verifier.seal(value)
                return bool(await self._daemon.dht.store(place, sealed, expires_at, subkey=self.peer_id))
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
                places = [self.verifier.place(key) for key in keys]
                found = await asyncio.gather(*(self._daemon.dht.get(place, latest=True) for place in places))
        except TimeoutError:
            raise SwarmNotFound(
                f"the swarm did not answer within {self.config.read_timeout_s:g} s", retryable=True
            ) from None
        except Exception as error:  # noqa: BLE001  # as above
            raise SwarmNotFound(f"the swarm cannot be read: {error!r}", retryable=True) from None
        return {key: _subkeys(result) for key, result in zip(keys, found, strict=True)}

    def set_dialable(self, dialable: bool) -> None:
        """Whether others can dial this node. One that they cannot lives on as clients do, within seconds: it announces
        and reads, but nobody is sent to it to store, find or join."""
        self._will_be_dialable = dialable and self.identity is not None

    async def open(self, key_path: Path | None) -> None:
        """Start and join. For `open_node` only, as the next two."""
        self._key_path = key_path
        await self._start(list(self._initial.values()))
        if self._initial:
            offsets = await self._running.clock_offsets(self._initial, self.config.rpc_timeout_s)
            self.clock_offset_s = statistics.median(offsets) if offsets else None
            _check_joined(offsets, list(self._initial.values()))

    async def close(self) -> None:
        """Leave and end the daemon."""
        if self._daemon is None:
            return
        try:
            await self._remember()
        finally:
            daemon, self._daemon = self._daemon, None
            await daemon.end(self.config.stop_timeout_s)

    async def tend(self) -> None:
        """Restart the daemon when it dies; keep in touch with other nodes, so that no restart splits the swarm."""
        while True:
            if await self._running.wait_for_end(self.config.reconnect_every_s):
                log.warning("the DHT daemon ended unexpectedly; starting it again")
                await self._restart()
            elif self._will_be_dialable != self._is_dialable:
                log.info("this node of the DHT is %s", "to be dialled" if self._will_be_dialable else "a client now")
                await self._restart()
            visits = (self._running.visit(maddr, self.config.rpc_timeout_s) for maddr in self._to_visit())
            await asyncio.gather(*visits)
            await self._remember()

    async def _remember(self) -> None:
        met = self.met
        if set(met) - self._remembered:
            self._remembered = set(met)
            await asyncio.to_thread(known_peers.remember, self.config.home_folder, met, self.now(), self.swarm)

    @property
    def _running(self) -> Daemon:
        if self._daemon is None:
            raise SwarmNotFound("the DHT node is being restarted", retryable=True)
        return self._daemon

    async def _start(self, nearby: Sequence[Maddr]) -> None:
        validator = PotluckValidator(self.verifier, self.now, self.refused)
        self._is_dialable = self._will_be_dialable
        self._daemon = await start_daemon(
            self.config, self.identity, self._key_path, nearby, validator, listens=self._is_dialable
        )
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
        return list(nodes.values())


@contextlib.asynccontextmanager
async def open_node(
    config: DhtConfig, identity: Identity | None = None, initial_peers: Sequence[str] = ()
) -> AsyncIterator[SwarmNode]:
    """A node of the swarm that `initial_peers` (multiaddrs) belong to; without any, the first node of a new swarm.

    Without an identity the node is a client: it listens nowhere, stores nothing for others, and cannot announce.

    Raises:
        ConfigError: the port is taken, the host is no address of this machine, or a multiaddr or the join token is
            malformed.
        SwarmNotFound: none of `initial_peers` answers.
        ClockOff: this machine's clock is off.
    """
    tame_hivemind_logs()
    token = await asyncio.to_thread(read_join_token, config.join_token)
    node = SwarmNode(config, identity, [Maddr.require(text) for text in initial_peers], token)
    with identity.key_file() if identity is not None else contextlib.nullcontext() as key_path:
        try:
            await node.open(key_path)
            async with background(node.tend(), "dht-node"):
                yield node
        finally:
            await node.close()


def _check_joined(offsets: list[float], initial: Sequence[Maddr]) -> None:
    if not offsets:
        raise unreachable([str(maddr) for maddr in initial])
    skew = statistics.median(offsets)
    if abs(skew) > MAX_CLOCK_SKEW_S:
        raise ClockOff(
            f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the swarm's, "
            f"and records expire by the clock; synchronise it (e.g. `timedatectl set-ntp true`) and try again"
        )


def _subkeys(result: Any) -> dict[str, bytes]:
    if result is None or not isinstance(result.value, dict):
        return {}
    return {
        subkey: item.value
        for subkey, item in result.value.items()
        if isinstance(subkey, str) and isinstance(item.value, bytes)
    }
