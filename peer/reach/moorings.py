"""A peer's ties to relays: two, so that it is still there when one of them goes."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from dht.background import task_group
from dht.record import PeerRecord
from peer.reach.tether import Tether
from peer.reach.verdict import choose_relay
from protocol.errors import PeerError
from protocol.hosts import address, host_of, is_global
from protocol.identity import Identity
from protocol.relay_frames import End

logger = logging.getLogger(__name__)

RELAYS = 2
AVOID_S = 30.0  # a relay that was lost or refused
LOOK_EVERY_S = 2.0  # for one, where there is none
LASTED_S = 60.0  # a tie that held for so long is nothing to avoid its relay for


class Moorings:
    """Keeps `RELAYS` ties, as far as there are relays.

    Args:
        peers: who may relay, at any moment.
        target: this peer's own gRPC port; None: it has none at the moment.
        changed: called when a tie holds or is lost.
        sought: told that a client wants to meet this peer at a relay: the relay's id, where it is, and the token.
    """

    def __init__(
        self,
        identity: Identity,
        peers: Callable[[], Sequence[PeerRecord]],
        target: Callable[[], End | None],
        changed: Callable[[], None],
        rng: random.Random | None = None,
        *,
        sought: Callable[[str, End, bytes], None] = lambda relay_id, relay, token: None,
    ) -> None:
        self._identity = identity
        self._peers = peers
        self._target = target
        self._changed = changed
        self._rng = rng or random.Random()
        self._sought = sought
        self._avoided: dict[str, float] = {}  # relays: until when
        self._ties: dict[int, tuple[PeerRecord, Tether]] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this peer is reached through its relays."""
        holding = [tether for _, tether in self._ties.values() if tether.holds]
        return tuple(dict.fromkeys(_shown(tether) for tether in holding))

    def carries(self, end: End) -> bool:
        """Does a connection to this peer's port, from there, come through a relay?"""
        return any(tether.carries(end) for _, tether in self._ties.values())

    async def run(self) -> None:
        """Ties, and ties anew, for ever."""
        async with task_group() as tasks:
            for slot in range(RELAYS):
                tasks.create_task(self._keep(slot), name=f"relay-tie-{slot}")

    async def _keep(self, slot: int) -> None:
        while True:
            relay = self._choose()
            if relay is None:
                await asyncio.sleep(LOOK_EVERY_S)
                continue
            ends = tuple((host_of(at), relay.relay_port) for at in relay.direct)
            sought = partial(self._sought, relay.peer_id)
            tether = Tether(self._identity, relay.peer_id, ends, self._target, sought)
            tether.welcome.add_done_callback(lambda _: self._changed())
            self._ties[slot] = relay, tether
            began_s = time.monotonic()
            try:
                await tether.run()
            except PeerError as error:
                logger.info("relay %s: %s", relay.peer_id[-8:], error.message)
            finally:
                del self._ties[slot]
                self._changed()
            if time.monotonic() - began_s < LASTED_S:
                self._avoided[relay.peer_id] = time.monotonic() + AVOID_S

    def _choose(self) -> PeerRecord | None:
        now_s = time.monotonic()
        self._avoided = {relay: until_s for relay, until_s in self._avoided.items() if until_s > now_s}
        taken = [relay for relay, _ in self._ties.values()]
        return choose_relay(self._peers(), self._identity.peer_id, taken, self._avoided, self._rng)


def _shown(tether: Tether) -> str:
    """The relay's address for others: where we are tied to it, or how it calls itself, if it is in our own network."""
    assert tether.end is not None
    host, port = tether.end
    return address(tether.peer_host if is_global(tether.peer_host) else host, port)
