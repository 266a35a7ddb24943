"""A multiaddr of a DHT node, `/ip4/203.0.113.5/tcp/4201/p2p/Qm...`: how to reach it, and who must answer there."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import ConfigError
from protocol.hosts import is_loopback

EXAMPLE = "/ip4/203.0.113.5/tcp/4201/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

_FORM = re.compile(
    r"(?P<transport>/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[A-Za-z0-9.:-]{1,253})/tcp/(?P<port>[0-9]{1,5}))"
    r"/p2p/(?P<peer_id>[1-9A-HJ-NP-Za-km-z]{44,64})"
)


@dataclass(frozen=True)
class Maddr:
    """`transport` is the part before `/p2p/`."""

    transport: str
    host: str
    port: int
    peer_id: str

    @classmethod
    def parse(cls, text: str) -> Maddr | None:
        """None: the text is no such multiaddr."""
        match = _FORM.fullmatch(text.strip())
        if match is None or not 1 <= int(match["port"]) <= 65535:
            return None
        if match["kind"] in ("ip4", "ip6"):
            try:
                address = ipaddress.ip_address(match["host"])
            except ValueError:
                return None
            if f"ip{address.version}" != match["kind"]:
                return None
        return cls(match["transport"], match["host"], int(match["port"]), match["peer_id"])

    @classmethod
    def require(cls, text: str) -> Maddr:
        """As `parse`.

        Raises:
            ConfigError: the text is no such multiaddr.
        """
        maddr = cls.parse(text)
        if maddr is None:
            raise ConfigError(f"{text!r} is not the address of a swarm's node; it looks like {EXAMPLE}")
        return maddr

    @property
    def is_loopback(self) -> bool:
        """Is it reachable from its own machine only?"""
        return is_loopback(self.host)

    def __str__(self) -> str:
        return f"{self.transport}/p2p/{self.peer_id}"


def best_first(texts: Iterable[str]) -> tuple[str, ...]:
    """Addresses that others can use before those that only this machine can; what is no address is left out."""
    maddrs = [maddr for text in texts if (maddr := Maddr.parse(text)) is not None]
    return tuple(str(maddr) for maddr in sorted(maddrs, key=lambda maddr: maddr.is_loopback))


def transport(host: str, port: int) -> str:
    """How to reach a host: `/ip4/HOST/tcp/PORT`, or `/ip6`, or `/dns` for a name."""
    try:
        kind = "ip6" if ipaddress.ip_address(host).version == 6 else "ip4"
    except ValueError:
        kind = "dns"
    return f"/{kind}/{host}/tcp/{port}"
