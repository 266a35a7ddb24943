"""Hosts, as addresses name them: what they are, and which belong together. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import unquote

V4_BLOCK, V6_BLOCK = 24, 48
"""Bits that the addresses of one operator have in common, more often than not."""
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # all of a machine's addresses: one that is its own

_PEER = re.compile(r"ipv[46]:(?P<host>.+):(?P<port>\d+)")


def host_of(address: str) -> str:
    """The host of `host:port` or `[v6]:port`."""
    return address.rpartition(":")[0].strip("[]")


def address(host: str, port: int) -> str:
    """`host:port`, or `[v6]:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_host(host: str) -> str:
    """Under which this machine itself reaches what listens at `host`."""
    return _OWN.get(host, host)


def ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The host as an IP address, an IPv4 one that wears IPv6's clothes as what it is; None: it is a name."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def block(host: str) -> str:
    """The block of addresses to which a host belongs; a name is its own."""
    found = ip(host)
    if found is None:
        return host
    return str(ipaddress.ip_network((found, V4_BLOCK if found.version == 4 else V6_BLOCK), strict=False))


def is_global(host: str) -> bool:
    """Is it an address of the whole internet's? A name counts as one."""
    found = ip(host)
    return found is None or found.is_global


def is_loopback(host: str) -> bool:
    """Does it name nothing but the machine that uses it?"""
    found = ip(host)
    return host == "localhost" if found is None else found.is_loopback


def seen_host(connection: str) -> str | None:
    """The IP address from which a call came, as grpc names connections (`ipv4:192.0.2.1:50000`); None: it is none."""
    return None if (end := seen_end(connection)) is None else end[0]


def end_of(name: Any) -> tuple[str, int]:
    """Host and port of a socket's name, which for IPv6 says more."""
    return str(name[0]), int(name[1])


def connection_of(host: str, port: int) -> str:
    """What grpc would call a connection from that IP address and port."""
    return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"


def seen_end(connection: str) -> tuple[str, int] | None:
    """The IP address and port from which a call came, as grpc names connections; None: it is none."""
    match = _PEER.fullmatch(unquote(connection))
    found = ip(match["host"].strip("[]")) if match is not None else None
    return None if match is None or found is None else (str(found), int(match["port"]))
