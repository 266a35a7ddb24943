"""What `doctor` finds, and says of it: each a line, with what to do about it. Pure: the facts are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from peer.reach.verdict import Position
from protocol.hosts import ip, is_global, is_loopback

Level = Literal["ok", "warning", "fault"]

GIB = 1 << 30
LITTLE_GIB, TOO_LITTLE_GIB = 2.0, 0.5  # of free memory: Python, torch and the smallest span take about 0.5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes:
        check: what was looked at, in a word.
        level: fault: with this the machine cannot serve.
        says: what was found; `remedy`: what to do about it.
    """

    check: str
    level: Level
    says: str
    remedy: str = ""


def can_serve(findings: Iterable[Finding]) -> bool:
    """Is there no fault?"""
    return all(finding.level != "fault" for finding in findings)


def addresses(hosts: Sequence[str]) -> Finding:
    """This machine's own IP addresses."""
    others = [host for host in hosts if not is_loopback(host)]
    if not others:
        return Finding(
            "addresses", "warning", "this machine is in no network", "connect it, unless the swarm lives on it"
        )
    whole = [host for host in others if is_global(host)]
    if whole:
        return Finding("addresses", "ok", f"{', '.join(whole)} {'is' if len(whole) == 1 else 'are'} of the internet")
    return Finding("addresses", "ok", f"{', '.join(others[:3])}: known in the local network only")


def port(name: str, number: int, taken: str | None) -> Finding:
    """A port that a peer listens at; `taken`: why it cannot."""
    if taken is not None:
        return Finding("ports", "fault", taken, f"end what uses it (a peer of yours?), or choose another --{name}")
    if not number:
        return Finding("ports", "ok", f"--{name} is not named: any free one is taken at each start")
    return Finding("ports", "ok", f"--{name} {number} is free")


def memory(free_bytes: int, total_bytes: int) -> Finding:
    """The machine's memory."""
    free = free_bytes / GIB
    says = f"{free:.1f} GiB of {total_bytes / GIB:.1f} are free"
    if free < TOO_LITTLE_GIB:
        return Finding("memory", "fault", says, "end other programs: a peer needs half a GiB before it holds any block")
    if free < LITTLE_GIB:
        return Finding(
            "memory", "warning", says, "it will hold few blocks; --quantization int8 or nf4 makes them smaller"
        )
    return Finding("memory", "ok", says)


def gpu(named: Sequence[str], wanted: str | None, threads: int) -> Finding:
    """GPUs that torch can use, each with its free memory; `wanted`: the --device that the user named."""
    if wanted is not None and wanted.startswith("cuda") and not named:
        return Finding(
            "GPU",
            "fault",
            f"torch finds none, and --device {wanted} asks for one",
            "install its driver, or leave it out",
        )
    if named:
        return Finding("GPU", "ok", "; ".join(named))
    return Finding("GPU", "ok", f"none that torch can use; {threads} processor cores compute")


def directory(how: str | None, nodes: int, peers: int) -> Finding:
    """The swarm's directory (DHT), joined through what; None: there is no swarm."""
    if how is None:
        return Finding("DHT", "warning", "no swarm was found", "a peer would start a new one; name one with --join")
    return Finding("DHT", "ok", f"joined through {how}: {_count(nodes, 'node')}, {_count(peers, 'peer')}")


def clock(offset_s: float | None, limit_s: float) -> Finding:
    """How far the swarm's clock is ahead of ours, at least; None: nobody was there to compare with."""
    if offset_s is None:
        return Finding("clock", "ok", "nobody is there to compare it with")
    if abs(offset_s) > limit_s:
        way = "behind" if offset_s > 0 else "ahead of"
        return Finding(
            "clock", "fault", f"{abs(offset_s):.0f} s {way} the swarm's", "set it, e.g. `timedatectl set-ntp true`"
        )
    return Finding("clock", "ok", f"right within {limit_s:g} s")


def nat(position: Position, own: Sequence[str]) -> Finding:
    """Whether somebody translates this machine's addresses on the way."""
    if not position.seen:
        return Finding("NAT", "ok", "nobody is there to say as whom others see this machine")
    mine = {str(ip(host)) for host in own}
    foreign = [host for host in position.seen if host not in mine]
    if foreign:
        return Finding("NAT", "ok", f"a router translates: others see this machine as {', '.join(foreign)}")
    return Finding("NAT", "ok", f"none: others see this machine as {', '.join(position.seen)}")


def reach(position: Position, number: int, asked: int) -> list[Finding]:
    """Whether others reach the gRPC port; a line for each host from which they see this machine."""
    if not position.seen:
        says = "nobody could be asked" if not asked else "those who were asked could not say"
        return [Finding("reach", "warning" if asked else "ok", f"{says} whether others reach this machine")]
    remedy = f"have your router forward TCP port {number} to this machine, and keep it with --port {number}"
    said = {
        "yes": Finding("reach", "ok", "reached by others at {host}"),
        "no": Finding("reach", "warning", "others do not reach port {port} at {host}", remedy),
        "unclear": Finding("reach", "warning", "some reach port {port} at {host}, some do not", remedy),
    }
    lines = [(said[verdict], host) for host, verdict in position.seen.items()]
    return [
        Finding(line.check, line.level, line.says.format(host=host, port=number), line.remedy) for line, host in lines
    ]


def relay(position: Position, offered: int, works: str | None, why_not: str) -> Finding:
    """Relays, for a machine that cannot be reached without; and whether this one can be one.

    Args:
        offered: peers that relay.
        works: the address at which this machine was reached through one; None: it was not, `why_not` says why.
    """
    if position.needs_relay:
        if works is not None:
            return Finding(
                "relay",
                "ok",
                f"this machine was reached through a relay, at {works}; {_count(offered, 'peer')} offer that",
            )
        level: Level = "fault" if position.is_hidden else "warning"
        remedy = "forward the port as said above, or wait for a peer that relays"
        return Finding("relay", level, why_not if offered else "no peer of this swarm relays", remedy)
    if position.relays:
        return Finding("relay", "ok", "not needed; this machine can relay for others")
    if position.seen:
        return Finding("relay", "ok", "not needed; to relay for others, forward --relay-port, too")
    return Finding("relay", "ok", f"{_count(offered, 'peer')} offer to relay")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
