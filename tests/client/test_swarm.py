"""A client's connection to a swarm, over a real node of the DHT."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from client.config import ClientConfig
from client.swarm import Swarm
from dht.config import DhtConfig
from dht.node import open_node
from protocol.errors import SwarmNotFound
from protocol.identity import Identity

END_S = 20.0


async def test_a_connection_that_is_closed_while_it_joins_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_HOME", str(tmp_path))
    config = DhtConfig(host="127.0.0.1", lan=False, new_swarm=True)
    async with open_node(config, Identity.ephemeral()) as node:
        for patience_s in (0.0, 0.3, 1.0):  # before it has begun, on its way, perhaps there already
            swarm = Swarm.begin(ClientConfig(join=node.maddrs))
            await asyncio.sleep(patience_s)
            async with asyncio.timeout(END_S):
                await asyncio.to_thread(swarm.close)
            with pytest.raises(SwarmNotFound, match="closed"):
                swarm.refresh()
