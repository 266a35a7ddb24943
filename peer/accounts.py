"""Accounts: what each client has of a peer, and may have. Pure: times are passed in.

A client is known by its key, and a key costs nothing. So an address counts as a few accounts at most: that of an IPv4
connection, or the /64 net of an IPv6 one, which is what one home is given. The first keys that are seen there have an
account each; all others, and whoever signs nothing, share one that is the address's own.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from peer.bucket import Bucket
from protocol.errors import PeerFull
from protocol.hosts import ip, seen_host

KEY_S = 600.0
"""So long a key counts as one of its address, after it was last seen: then another one may have its place."""
MAX_ACCOUNTS = 4096
"""Remembered at once; beyond, those are forgotten that were not seen for longest."""
IPV6_HOME = 64
MOST_PAUSE_S = 10.0
"""Whoever is refused again and again waits no longer for that."""
RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one client may have at most.

    Attributes:
        sessions: at once.
        opens_per_s: sessions that it opens, or takes up again, in the long run.
        opens_at_once: of these, without a pause.
        tokens: rows x tokens of its steps that arrive, wait or run.
        bytes_per_s: of the steps that it sends, in the long run; whoever sends more is read more slowly.
        share: of the cache and of the memory for steps, while other clients have sessions too.
        keys: that are told apart at one address.
        streams: open at once at one address.
    """

    sessions: int
    opens_per_s: float
    opens_at_once: int
    tokens: int
    bytes_per_s: float
    share: float
    keys: int
    streams: int


@dataclass(slots=True, eq=False)
class Account:
    """One client's. `name`: its id, or its address where that is all that is known.

    Attributes:
        tokens, nbytes: of its steps that arrive, wait or run.
        seen_s: when it last opened a session.
    """

    name: str
    allowance: Allowance
    opens: Bucket = field(init=False)
    traffic: Bucket = field(init=False)
    tokens: int = 0
    nbytes: int = 0
    seen_s: float = 0.0

    def __post_init__(self) -> None:
        allowance = self.allowance
        self.opens = Bucket(allowance.opens_per_s, allowance.opens_at_once)
        self.traffic = Bucket(allowance.bytes_per_s, allowance.bytes_per_s)

    def note_open(self, now_s: float) -> None:
        """It opens a session, or takes one up again.

        Raises:
            PeerFull: it does so too often.
        """
        if wait_s := self.opens.wait_s(1.0, now_s):
            raise PeerFull(
                f"this client opens more than {self.allowance.opens_per_s:g} sessions per second", retry_after_s=wait_s
            )
        self.opens.take(1.0, now_s)

    def hold(self, nbytes: int, tokens: int, most_bytes: int) -> None:
        """A step of its begins to arrive. `most_bytes`: that all its steps may have now.

        Raises:
            PeerFull: they are too many, or too large; nothing is held.
        """
        if self.tokens + tokens > self.allowance.tokens:
            raise PeerFull(
                f"this client has steps of {self.tokens} tokens under way, of {self.allowance.tokens} at most",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.nbytes and self.nbytes + nbytes > most_bytes:
            raise PeerFull(
                f"this client has steps of {self.nbytes >> 20} MiB under way, of {most_bytes >> 20} MiB at most while "
                "others have sessions here",
                retry_after_s=RETRY_AFTER_S,
            )
        self.tokens += tokens
        self.nbytes += nbytes

    def release(self, nbytes: int, tokens: int) -> None:
        """What was held is through, or was given up."""
        self.tokens -= tokens
        self.nbytes -= nbytes
        assert self.tokens >= 0 and self.nbytes >= 0, "released more than was held"


class Accounts:
    """All accounts of a peer.

    Args:
        bytes_per_s: of the steps that all clients send together; those who send are read more slowly.
    """

    def __init__(self, allowance: Allowance, bytes_per_s: float = math.inf) -> None:
        self.allowance = allowance
        self._traffic = Bucket(bytes_per_s, bytes_per_s)
        self._accounts: dict[str, Account] = {}  # by name, the one that was seen last at the end
        self._keys: dict[str, dict[str, float]] = {}  # by address: the keys that have an account, and when last seen
        self._streams: dict[str, int] = {}  # by address
        self._refusals: dict[str, Bucket] = {}  # by address

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, address: str, client_id: str, now_s: float) -> Account:
        """On whose account a session is.

        Args:
            address: see `home_of`.
            client_id: of whoever signed; empty: nobody did.
        """
        name = client_id if client_id and self._counts(address, client_id, now_s) else address
        account = self._accounts.pop(name, None) or Account(name, self.allowance)
        account.seen_s = now_s
        self._accounts[name] = account
        while len(self._accounts) > MAX_ACCOUNTS:
            del self._accounts[next(iter(self._accounts))]
        return account

    def _counts(self, address: str, client_id: str, now_s: float) -> bool:
        """Has this key an account of its own, at this address?"""
        live = {key: at_s for key, at_s in self._keys.pop(address, {}).items() if now_s - at_s < KEY_S}
        if client_id in live or len(live) < self.allowance.keys:
            live[client_id] = now_s
        self._keys[address] = live
        while len(self._keys) > MAX_ACCOUNTS:
            del self._keys[next(iter(self._keys))]
        return client_id in live

    def pause_s(self, account: Account | None, nbytes: int, now_s: float) -> float:
        """So many bytes have come from a client, of whatever account: seconds that it is not to be read for."""
        buckets = [self._traffic] if account is None else [self._traffic, account.traffic]
        return max([bucket.take(nbytes, now_s) for bucket in buckets])

    def refused(self, address: str, now_s: float) -> float:
        """An opening from there is refused: seconds to wait before that is said. None at first; but who asks again and
        again, without a pause, shall not keep this peer busy with saying no."""
        bucket = self._refusals.pop(address, None) or Bucket(self.allowance.opens_per_s, self.allowance.opens_at_once)
        self._refusals[address] = bucket
        while len(self._refusals) > MAX_ACCOUNTS:
            del self._refusals[next(iter(self._refusals))]
        pause_s = bucket.wait_s(1.0, now_s)
        if pause_s >= MOST_PAUSE_S:
            return MOST_PAUSE_S
        bucket.take(1.0, now_s)
        return pause_s

    def enter(self, address: str) -> None:
        """A stream begins.

        Raises:
            PeerFull: there are too many from there.
        """
        streams = self._streams.get(address, 0)
        if streams >= self.allowance.streams:
            raise PeerFull(
                f"{self.allowance.streams} streams from one address are open already", retry_after_s=RETRY_AFTER_S
            )
        self._streams[address] = streams + 1

    def leave(self, address: str) -> None:
        """A stream that has entered ends."""
        self._streams[address] -= 1
        if not self._streams[address]:
            del self._streams[address]


def home_of(peer: str) -> str:
    """The address that counts, of what gRPC calls a peer: `ipv4:192.0.2.7:5000`, `ipv6:%5B2001:db8::1%5D:5000`."""
    host = seen_host(peer)
    address = None if host is None else ip(host)
    if address is None:
        return peer.partition(":")[0]  # a socket of this machine
    if address.version == 6:
        return str(ipaddress.ip_network((address, IPV6_HOME), strict=False))
    return str(address)
