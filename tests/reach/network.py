"""Two homes behind routers that masquerade, and a public network between them, out of Linux network namespaces.

    10.1.0.2 home-a ── router-a 45.77.30.2 ──┐             ┌── 45.77.10.2 one
                                            bridge (net)
    10.2.0.2 home-b ── router-b 45.77.40.2 ──┘             └── 45.77.20.2 two

`room-a`, 10.1.0.3, is a second machine of home a.

The public addresses look like the internet's: libp2p announces no others. Needs root, `ip` and `nft`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator

PUBLIC = {"one": "45.77.10.2", "two": "45.77.20.2", "router-a": "45.77.30.2", "router-b": "45.77.40.2"}
HOMES = {"home-a": ("router-a", "10.1.0", 2), "home-b": ("router-b", "10.2.0", 2), "room-a": ("router-a", "10.1.0", 3)}

NAT = """
table ip nat {
  chain incoming { type nat hook prerouting priority -100; policy accept; }
  chain outgoing { type nat hook postrouting priority 100; policy accept; oifname "public" masquerade; }
}
"""
FILTER = """
table ip filter {
  chain through {
    type filter hook forward priority 0; policy accept;
    ct status dnat accept
    iifname "public" ct state new,invalid drop
  }
  chain local {
    type filter hook input priority 0; policy accept;
    iifname "public" ct state new,invalid drop
  }
}
"""
RULES = NAT + FILTER


class Network:
    """The namespaces; made by `two_homes`."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def name(self, place: str) -> str:
        return f"{self._prefix}-{place}"

    def inside(self, place: str) -> tuple[str, ...]:
        """What to put before a command for it to run there."""
        return ("ip", "netns", "exec", self.name(place))

    def run(self, place: str, *command: str, stdin: str | None = None) -> str:
        return _run(*self.inside(place), *command, stdin=stdin)

    def is_connected(self, place: str, host: str, port: int | None = None) -> bool:
        """Is there a TCP connection from that place to there? `port` None: to any port."""
        at = "[0-9A-F]{4}" if port is None else f"{port:04X}"
        there = f"{socket.inet_aton(host)[::-1].hex().upper()}:{at} 01"
        return re.search(there, self.run(place, "cat", "/proc/net/tcp", "/proc/net/tcp6")) is not None

    def reaches(self, place: str, host: str, port: int) -> bool:
        """Does a TCP connection from that place to there come about within a second?"""
        try:
            self.run(place, "timeout", "1", "bash", "-c", f"</dev/tcp/{host}/{port}")
        except subprocess.CalledProcessError:
            return False
        return True

    def unplug(self, place: str) -> None:
        """From now on nothing comes from there, or gets there."""
        _ip(self, "net", "link", "set", f"to-{place}", "down")

    def plug(self, place: str) -> None:
        """It is in the network again, though for a second or two its kernel may still say that nobody is there."""
        _ip(self, "net", "link", "set", f"to-{place}", "up")

    def forward(self, outer: int, inner: int) -> None:
        """From now on the router of home a forwards a port."""
        self.run("router-a", "nft", "add", "rule", "ip", "nat", "incoming", "iifname", "public",
                 "tcp", "dport", str(outer), "dnat", "to", f"10.1.0.2:{inner}")  # fmt: skip

    def scatter(self, home: str) -> None:
        """From now on the home's router shows another port to each destination, as some do."""
        router, *_ = HOMES[home]
        self.run(router, "nft", "flush", "chain", "ip", "nat", "outgoing")
        self.run(router, "nft", "add", "rule", "ip", "nat", "outgoing", "oifname", "public", "masquerade",
                 "random,fully-random")  # fmt: skip

    def gather(self, home: str) -> None:
        """It is as before."""
        router, *_ = HOMES[home]
        self.run(router, "nft", "flush", "chain", "ip", "nat", "outgoing")
        self.run(router, "nft", "add", "rule", "ip", "nat", "outgoing", "oifname", "public", "masquerade")

    def block(self, home: str, host: str) -> None:
        """From now on nothing passes between a home and that host; nobody is told."""
        router, *_ = HOMES[home]
        for end in ("saddr", "daddr"):
            self.run(router, "nft", "insert", "rule", "ip", "filter", "through", "ip", end, host, "drop")

    def unblock(self, home: str) -> None:
        """It is as before."""
        router, *_ = HOMES[home]
        self.run(router, "nft", "delete", "table", "ip", "filter")
        self.run(router, "nft", "-f", "-", stdin=FILTER)

    def shape(self, mbit_per_s: int) -> None:
        """From now on the line of home a carries no more, in either direction."""
        for place, device in (("router-a", "public"), ("net", "to-router-a")):
            self.run(place, "tc", "qdisc", "add", "dev", device, "root", "tbf",
                     "rate", f"{mbit_per_s}mbit", "burst", "128kb", "latency", "50ms")  # fmt: skip

    def unshape(self) -> None:
        """The line is as before."""
        for place, device in (("router-a", "public"), ("net", "to-router-a")):
            self.run(place, "tc", "qdisc", "del", "dev", device, "root")


def trouble() -> str | None:
    """Why there can be no such network here; None: there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [tool for tool in ("ip", "nft", "tc") if shutil.which(tool) is None]:
        return f"there is no {' and no '.join(missing)} here"
    name = f"potluck-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"
    try:
        _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=RULES)
    except subprocess.CalledProcessError as error:
        return f"this machine's kernel does not masquerade: {error.stderr.strip()}"
    finally:
        _run("ip", "netns", "del", name)
    return None


@contextlib.contextmanager
def two_homes() -> Iterator[Network]:
    """The network; on exit it is gone."""
    network = Network(f"potluck-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        for place in ("net", *PUBLIC, *HOMES):
            _run("ip", "netns", "add", network.name(place))
            stack.callback(_run, "ip", "netns", "del", network.name(place))
            _ip(network, place, "link", "set", "lo", "up")
        _ip(network, "net", "link", "add", "bridge", "type", "bridge")
        _ip(network, "net", "link", "set", "bridge", "up")
        for place, address in PUBLIC.items():
            _cable(network, place, "public", "net", f"to-{place}")
            _ip(network, "net", "link", "set", f"to-{place}", "master", "bridge")
            _ip(network, place, "addr", "add", f"{address}/16", "dev", "public")
        for router, net in {router: net for router, net, _ in HOMES.values()}.items():
            _ip(network, router, "link", "add", "lan", "type", "bridge")
            _ip(network, router, "link", "set", "lan", "up")
            _ip(network, router, "addr", "add", f"{net}.1/24", "dev", "lan")
            network.run(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            network.run(router, "nft", "-f", "-", stdin=RULES)
        for home, (router, net, number) in HOMES.items():
            _cable(network, home, "lan", router, f"to-{home}")
            _ip(network, router, "link", "set", f"to-{home}", "master", "lan")
            _ip(network, home, "addr", "add", f"{net}.{number}/24", "dev", "lan")
            _ip(network, home, "route", "add", "default", "via", f"{net}.1")
        yield network


def _cable(network: Network, place: str, device: str, other: str, other_device: str) -> None:
    _run("ip", "link", "add", device, "netns", network.name(place), "type", "veth",
         "peer", "name", other_device, "netns", network.name(other))  # fmt: skip
    _ip(network, place, "link", "set", device, "up")
    _ip(network, other, "link", "set", other_device, "up")


def _ip(network: Network, place: str, *arguments: str) -> None:
    _run("ip", "-n", network.name(place), *arguments)


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, input=stdin, timeout=20)
    return done.stdout
