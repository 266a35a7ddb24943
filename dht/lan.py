"""Swarms on the local network, by mDNS: nodes advertise `_potluck._tcp.local.`, newcomers listen for a moment.

What is heard is only a hint. Whoever answers at an address must prove the peer id in it, and records are signed; but
anyone on the network can lure a newcomer into a swarm of their own, as with any printer. `lan = false` turns it off.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Sequence

from zeroconf import ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from dht.background import background
from dht.maddr import Maddr, best_first

log = logging.getLogger(__name__)

SERVICE = "_potluck._tcp.local."
MAX_SERVICES = 32
MAX_MADDRS = 4
STOP_TIMEOUT_S = 3.0


@contextlib.asynccontextmanager
async def advertised(maddrs: Sequence[str], timeout_s: float, swarm: str = "") -> AsyncIterator[None]:
    """Let others on the local network find this node while the body runs; without a network, do nothing.

    `swarm`: the name of a private one, whose members alone take it up.
    """
    reachable = [maddr for text in maddrs if (maddr := Maddr.parse(text)) is not None and not maddr.is_loopback]
    if not reachable:
        yield
        return
    async with background(_advertise(reachable[:MAX_MADDRS], timeout_s, swarm=swarm), "mdns-advertise"):
        yield


async def browse(timeout_s: float, interfaces: Sequence[str] | None = None, swarm: str = "") -> tuple[str, ...]:
    """Multiaddrs of the node of `swarm` that answers first; () if none does within `timeout_s`, or there is no network.

    Args:
        interfaces: IP addresses of the interfaces to listen on; default: all.
    """
    heard: asyncio.Queue[str] = asyncio.Queue(MAX_SERVICES)

    def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed and not heard.full():
            heard.put_nowait(name)

    try:
        async with _zeroconf(interfaces) as network:
            browser = AsyncServiceBrowser(network.zeroconf, SERVICE, handlers=[on_change])
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        info = AsyncServiceInfo(SERVICE, await heard.get())
                        answered = await info.async_request(network.zeroconf, timeout_s * 1000)
                        is_ours = (info.decoded_properties.get("swarm") or "") == swarm
                        if answered and is_ours and (found := _maddrs(info)):
                            return found
            except TimeoutError:
                return ()
            finally:
                await browser.async_cancel()
    except OSError as error:
        log.debug("the local network cannot be searched: %s", error)
        return ()


async def _advertise(
    maddrs: Sequence[Maddr], timeout_s: float, interfaces: Sequence[str] | None = None, swarm: str = ""
) -> None:
    addresses = [ipaddress.ip_address(maddr.host).packed for maddr in maddrs if _is_ip(maddr.host)]
    info = AsyncServiceInfo(
        SERVICE,
        f"{maddrs[0].peer_id[-24:]}.{SERVICE}",
        addresses=addresses,
        port=maddrs[0].port,
        properties={f"maddr{index}": str(maddr) for index, maddr in enumerate(maddrs)} | {"swarm": swarm},
        server=f"{maddrs[0].peer_id[-24:].lower()}.local.",
    )
    try:
        async with _zeroconf(interfaces) as network:
            async with asyncio.timeout(timeout_s + STOP_TIMEOUT_S):
                await (await network.async_register_service(info))
            try:
                await asyncio.Event().wait()
            finally:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await (await network.async_unregister_service(info))
    except (OSError, TimeoutError) as error:
        log.debug("this node cannot be found on the local network: %s", error)


@contextlib.asynccontextmanager
async def _zeroconf(interfaces: Sequence[str] | None) -> AsyncIterator[AsyncZeroconf]:
    network = AsyncZeroconf() if interfaces is None else AsyncZeroconf(interfaces=list(interfaces))
    try:
        yield network
    finally:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await network.async_close()


def _maddrs(info: AsyncServiceInfo) -> tuple[str, ...]:
    values = [info.decoded_properties.get(f"maddr{index}") for index in range(MAX_MADDRS)]
    return best_first(value for value in values if value is not None)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
