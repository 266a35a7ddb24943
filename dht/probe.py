"""Does anything listen at an address? Asked before a node is dialled in earnest."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from dht.maddr import Maddr

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
