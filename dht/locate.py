"""Finding a swarm when nobody said where it is, or when somebody did."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from dht import known_peers, lan, local_swarm
from dht.config import DhtConfig
from dht.maddr import EXAMPLE, Maddr
from dht.probe import reachable
from protocol.errors import ConfigError, SwarmNotFound
from protocol.join_token import read_join_token

log = logging.getLogger(__name__)

MAX_LIST_BYTES = 64 << 10


@dataclass(frozen=True)
class Located:
    """Nodes to join through, and where they were found, for people: `joined through {how}`. None: start a new swarm."""

    maddrs: tuple[str, ...]
    how: str


async def locate_swarm(config: DhtConfig, join: Sequence[str] = ()) -> Located:
    """The swarm to join.

    That is `join`, else `config.join` (flag, POTLUCK_JOIN or file), else the first of these that is there: the
    bootstrap list, the swarm of this machine, known peers, the local network.

    Addresses that a person gave are taken as they are. Of those found elsewhere, only nodes at which something listens
    count; whether it is the right node, joining will tell.

    Raises:
        ConfigError: an address or the join token is malformed, or the bootstrap list cannot be read.
        SwarmNotFound: none was found; the message says how to join one.
    """
    given = tuple(join) or config.join
    if given:
        return Located(tuple(str(Maddr.require(text)) for text in given), "the given address")
    if config.new_swarm:
        return Located((), "a new swarm")
    home = config.home_folder
    token = await asyncio.to_thread(read_join_token, config.join_token)
    swarm = "" if token is None else token.name
    if config.bootstrap_list is not None:
        found = await reachable(await read_bootstrap_list(config.bootstrap_list, config), config.probe_timeout_s)
        if found:
            return Located(found, "the bootstrap list")
    if config.local:
        for node in await asyncio.to_thread(local_swarm.find, home, swarm):
            # one node only: a second one might belong to another swarm, and joining both would merge them
            found = await reachable(node.maddrs, config.probe_timeout_s)
            if found:
                return Located(found, "a node on this machine")
    found = await reachable(await asyncio.to_thread(known_peers.load, home, swarm), config.probe_timeout_s)
    if found:
        return Located(found, "known peers")
    if config.lan and not config.is_loopback:
        found = await reachable(await lan.browse(config.lan_timeout_s, swarm=swarm), config.probe_timeout_s)
        if found:
            return Located(found, "the local network")
    raise SwarmNotFound(
        f"no swarm was found; start one (`python -m peer serve`), or name a node of one: --join {EXAMPLE}"
    )


async def read_bootstrap_list(source: str, config: DhtConfig) -> tuple[str, ...]:
    """The addresses in a file or under an HTTPS URL: one per line, `#` begins a comment. Other lines are left out.

    Raises:
        ConfigError: the file cannot be read, or the URL is not HTTPS. A URL that does not answer is only a warning.
    """
    if "://" in source:
        text = await _fetch(source, config.fetch_timeout_s)
    else:
        try:
            text = await asyncio.to_thread(_read_head, source)
        except OSError as error:
            raise ConfigError(f"the bootstrap list {source} cannot be read: {error.strerror or error}") from None
    maddrs = []
    for line in text.splitlines():
        entry = line.partition("#")[0].strip()
        if entry and Maddr.parse(entry) is None:
            log.warning("the bootstrap list %s has a line that is no address: %.100r", source, entry)
        elif entry:
            maddrs.append(entry)
    return tuple(maddrs)


def _read_head(path: str) -> str:
    with Path(path).expanduser().open("rb") as file:
        return file.read(MAX_LIST_BYTES).decode(errors="replace")


async def _fetch(url: str, timeout_s: float) -> str:
    if not url.startswith("https://"):
        raise ConfigError(f"the bootstrap list must be a file or an https:// URL, not {url}")
    body = bytearray()
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx2.AsyncClient(timeout=timeout_s) as client,
            client.stream("GET", url) as answer,
        ):
            answer.raise_for_status()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_LIST_BYTES:
                    break
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError) as error:
        log.warning("the bootstrap list %s cannot be fetched: %s", url, error or type(error).__name__)
        return ""
    return bytes(body[:MAX_LIST_BYTES]).decode(errors="replace")
