"""A private swarm over real nodes: members see each other, strangers see nothing and are taken by nobody, and whoever
forges, replays or buries a record changes nothing."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dht.announcer import REFUSED, announcing
from dht.config import DhtConfig
from dht.node import SwarmNode, open_node
from dht.record import PeerRecord
from dht.view import SwarmReader
from protocol.errors import ConfigError
from protocol.identity import Identity
from protocol.join_token import JoinToken
from tests.dht.support import MODEL, identity, listing, peer

TOKEN = JoinToken.new()


@pytest.fixture
def config(tmp_path: Path) -> DhtConfig:
    return DhtConfig(host="127.0.0.1", home=str(tmp_path / "home"), lan=False, reconnect_every_s=0.1, rpc_timeout_s=2.0)


def now_peer(index: int, span: str = "0:24", **values: Any) -> PeerRecord:
    now = time.time()
    return peer(index, span, **{"sequence": time.time_ns(), "expires_at": now + 60, "started_at": now, **values})


async def publish(node: SwarmNode, who: Identity, record: PeerRecord) -> bool:
    return await node.store(record.key(1), record.encode(who), record.expires_at)


async def seen_from(node: SwarmNode) -> dict[str, str]:
    view = await SwarmReader(node, [MODEL]).refresh()
    return {record.peer_id: record.state for record in view.peers(MODEL)}


@pytest.mark.parametrize("token", [None, JoinToken.new().text], ids=["no token", "another token"])
async def test_strangers_see_nothing_and_are_not_seen(
    config: DhtConfig, token: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN.text)
    member, stranger = replace(config, join_token=str(file)), replace(config, join_token=token)
    async with (
        open_node(member, identity(0)) as first,
        announcing(first, lambda: peer(0, started_at=time.time()), listing(0)),
        open_node(member, None, first.maddrs) as client,
        open_node(stranger, identity(1), first.maddrs) as outside,
    ):
        assert await seen_from(client) == {identity(0).peer_id: "online"}
        assert await seen_from(outside) == {}
        assert not first.is_refused
        with caplog.at_level(logging.WARNING):
            async with announcing(outside, lambda: peer(1, started_at=time.time()), listing(1)):
                assert outside.is_refused, "who announces in vain is told why"
                assert await seen_from(client) == {identity(0).peer_id: "online"}
        assert REFUSED in caplog.text and "--join-token" in REFUSED
        assert first.refused.total() >= 2


async def test_records_of_others_are_neither_overwritten_nor_buried(config: DhtConfig) -> None:
    """By a node that speaks hivemind's protocol and may send whatever it likes; without a token, which checks more."""
    async with open_node(config, identity(0)) as first, open_node(config, identity(1), first.maddrs) as evil:
        old = now_peer(0, "0:12")
        assert await publish(first, identity(0), old)
        current = now_peer(0, "0:24", expires_at=old.expires_at + 1)
        assert await publish(first, identity(0), current)
        assert evil._daemon is not None
        put = evil._daemon.dht.store
        victim, key = identity(0).peer_id, current.key(1)
        later = current.expires_at + 5

        def buried_by(signer: int) -> bytes:
            return now_peer(signer, state="offline", expires_at=later).encode(identity(signer))

        attempts: dict[str, tuple[bytes, float]] = {
            "a tombstone, signed by another": (buried_by(1), later),
            "an older record, once more": (old.encode(identity(0)), old.expires_at),
            "an older record, with a new expiry": (old.encode(identity(0)), later),
            "the record under a new expiry": (current.encode(identity(0)), later),
            "a broken signature": (current.encode(identity(0))[:-1] + b"x", later),
            "nothing": (b"", later),
            "much": (bytes(20_000), later),
        }
        for what, (raw, expires_at) in attempts.items():
            await put(key, raw, expires_at, subkey=victim, exclude_self=True)
            reader = SwarmReader(first, [MODEL])
            (record,) = (await reader.refresh()).peers(MODEL)
            assert (record.peer_id, str(record.span), record.state) == (victim, "0:24", "online"), what
        expired = now_peer(1, expires_at=time.time() - 1)
        await put(key, expired.encode(identity(1)), expired.expires_at, subkey=identity(1).peer_id, exclude_self=True)
        assert await seen_from(first) == {victim: "online"}


async def test_a_wrong_token_is_the_users_mistake(config: DhtConfig) -> None:
    with pytest.raises(ConfigError, match="has a mistake"):
        async with open_node(replace(config, join_token=TOKEN.text[:-1])):
            pass
