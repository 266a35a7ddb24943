"""Does anything listen at an address? Asked before a node is dialled in earnest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from dht.maddr import Maddr
from protocol.errors import SwarmNotFound

MAX_PROBES = 16


async def listens(maddr: Maddr, timeout_s: float) -> bool:
    """Does a TCP connection to the node come about within `timeout_s`? Says nothing about who it is."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(maddr.host, maddr.port)
            writer.close()
            await writer.wait_closed()
    except (OSError, TimeoutError, UnicodeError):  # UnicodeError: a host name that cannot be encoded
        return False
    return True


async def reachable(maddrs: Iterable[str], timeout_s: float) -> tuple[str, ...]:
    """Those of the first `MAX_PROBES` addresses at which something listens, in the same order."""
    candidates = [maddr for text in maddrs if (maddr := Maddr.parse(text)) is not None][:MAX_PROBES]
    answers = await asyncio.gather(*(listens(maddr, timeout_s) for maddr in candidates))
    return tuple(str(maddr) for maddr, answered in zip(candidates, answers, strict=True) if answered)


async def require_listener(maddrs: Sequence[str], timeout_s: float) -> None:
    """Returns as soon as something listens at one of the addresses; of none there is nothing to ask.

    Raises:
        SwarmNotFound: nothing does, or not within `timeout_s`.
        ConfigError: one of them is no address.
    """
    asked = [asyncio.ensure_future(listens(maddr, timeout_s)) for maddr in map(Maddr.require, maddrs)]
    try:
        for answer in asyncio.as_completed(asked):
            if await answer:
                return
    finally:
        for task in asked:
            task.cancel()
    if asked:
        raise unreachable(maddrs)


def unreachable(maddrs: Sequence[str]) -> SwarmNotFound:
    """What a person is told when no node answers."""
    return SwarmNotFound(
        f"no node of the swarm answers at {', '.join(maddrs)}; check that one runs there and that the address is right"
    )
