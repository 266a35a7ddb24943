"""Real nodes on loopback: 2 to 4 hivemind nodes with their daemons, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from dht import daemon, known_peers, ports
from dht.announcer import announcing
from dht.config import DhtConfig
from dht.locate import locate_swarm
from dht.node import SwarmNode, open_node
from dht.record import MODELS_KEY, PeerRecord, peer_key
from dht.view import SwarmReader, SwarmView, reading
from protocol.errors import ConfigError, SwarmNotFound
from protocol.identity import Identity, claim_identity
from tests.dht.support import MODEL, N_BLOCKS, identity, listing, peer
from tests.waiting import until

TIMEOUT_S = 20.0


@pytest.fixture
def config(tmp_path: Path) -> DhtConfig:
    return DhtConfig(
        host="127.0.0.1",
        home=str(tmp_path / "home"),
        lan=False,
        refresh_every_s=0.05,
        reconnect_every_s=0.1,
        rpc_timeout_s=2.0,
    )


@pytest.fixture(autouse=True)
def no_daemon_is_left() -> Any:
    before = set(daemons())
    yield
    assert set(daemons()) <= before


def daemons() -> list[int]:
    """The p2pd processes of this process."""
    return [child.pid for child in psutil.Process().children(recursive=True) if child.name() == "p2pd"]


def now_peer(index: int, span: str = "0:24", lives_s: float = 60.0, **values: Any) -> PeerRecord:
    """A record as of the real clock."""
    now = time.time()
    return peer(index, span, sequence=time.time_ns(), expires_at=now + lives_s, started_at=now, **values)


@contextlib.asynccontextmanager
async def two_nodes(config: DhtConfig) -> AsyncIterator[tuple[SwarmNode, SwarmNode]]:
    async with open_node(config, identity(0)) as first, open_node(config, identity(1), first.maddrs) as second:
        yield first, second


async def publish(node: SwarmNode, index: int, record: PeerRecord) -> bool:
    return await node.store(record.key(1), record.encode(identity(index)), record.expires_at)


async def test_a_client_sees_peers_come_change_and_leave(config: DhtConfig) -> None:
    state = "joining"
    async with two_nodes(config) as (first, second), open_node(config, None, first.maddrs) as client:
        assert first.peer_id == identity(0).peer_id and client.maddrs == ()
        async with reading(client) as reader:
            assert reader.view.models == ()
            async with announcing(first, lambda: peer(0, "0:12"), listing(0)):
                seen = await reader.wait_until(lambda view: bool(view.models), TIMEOUT_S)
                assert [str(span) for span in seen.missing(MODEL)] == ["12:24"]
                async with announcing(second, lambda: peer(1, "12:24", state=state), listing(1)) as announcer:
                    await reader.wait_until(lambda view: len(view.peers(MODEL)) == 2, TIMEOUT_S)
                    assert reader.view.missing(MODEL)
                    state = "online"
                    announcer.changed()
                    await reader.wait_until(lambda view: not view.missing(MODEL), TIMEOUT_S)
                    assert reader.view.coverage(MODEL) == (1,) * N_BLOCKS
                # Long before its record expires: a tombstone counts as soon as it is read.
                left = await reader.wait_until(lambda view: len(view.peers(MODEL)) == 1, TIMEOUT_S)
                assert left.peers(MODEL)[0].peer_id == identity(0).peer_id
            await reader.wait_until(lambda view: view.models == (), TIMEOUT_S)
            assert reader.view.dropped == {}


async def test_a_peer_that_falls_silent_disappears_when_its_record_expires(config: DhtConfig) -> None:
    async with two_nodes(config) as (first, second), reading(first, [MODEL]) as reader:
        record = now_peer(1, lives_s=1.5)
        assert await publish(second, 1, record)
        assert (await reader.refresh()).peers(MODEL)
        await reader.wait_until(lambda view: not view.peers(MODEL), 5)
        assert time.time() >= record.expires_at


async def test_bad_records_are_refused_by_nodes_and_never_shown(config: DhtConfig) -> None:
    from hivemind.dht.node import DHTNode
    from hivemind.p2p import P2P

    async with two_nodes(config) as (first, second):
        assert await publish(second, 1, now_peer(1, "0:12"))
        p2p = await P2P.create(initial_peers=list(first.maddrs), auto_nat=False, nat_port_map=False)
        evil = await DHTNode.create(p2p=p2p, initial_peers=list(first.maddrs), cache_locally=False)
        try:
            good = now_peer(1, "0:12")
            raw = good.encode(identity(1))
            key, expires_at = good.key(1), good.expires_at
            for value, subkey, expiry in [
                (raw[:-1] + bytes([raw[-1] ^ 1]), identity(1).peer_id, expires_at),  # forged
                (raw, identity(2).peer_id, expires_at),  # another's, under a name of one's own
                (raw, identity(1).peer_id, expires_at + 5),  # kept alive by a stranger
                (b"x" * 20_000, identity(2).peer_id, expires_at),  # oversized
                ("text", identity(2).peer_id, expires_at),
            ]:
                await evil.store(key, value, expiry, subkey=subkey, exclude_self=True)
            await evil.store(key, b"plain", expires_at + 20, exclude_self=True)
            far = now_peer(2, lives_s=3600)
            await evil.store(
                key, far.encode(identity(2)), far.expires_at, subkey=identity(2).peer_id, exclude_self=True
            )
            reasons = first.refused.copy()
            assert {"the signature is wrong", "the subkey is not the signer", "the record would live too long"} <= set(
                reasons
            )
            # A stored record whose payload is nonsense passes nodes and stops at the reader.
            from dht.envelope import seal

            sealed = seal(identity(2), kind="peer", key=key, sequence=1, expires_at=expires_at, payload=b"\x80")
            assert await evil.store(key, sealed, expires_at, subkey=identity(2).peer_id)
            async with open_node(config, None, first.maddrs) as client:
                view = await SwarmReader(client, [MODEL]).refresh()
                assert [record.peer_id for record in view.peers(MODEL)] == [identity(1).peer_id]
                assert view.dropped["n_blocks is missing"] == 1
        finally:
            await evil.shutdown()
            await p2p.shutdown()


async def test_a_node_that_lies_about_expiry_hides_nobody(config: DhtConfig) -> None:
    from hivemind.dht.node import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.p2p import P2P

    async with two_nodes(config) as (first, second):
        assert await publish(second, 1, now_peer(1))
        key = DHTID.generate(source=peer_key(MODEL, 0))
        p2p = await P2P.create(initial_peers=list(first.maddrs), auto_nat=False, nat_port_map=False)
        # as near to the key as can be, so that it is asked first
        evil = await DHTNode.create(
            p2p=p2p, initial_peers=list(first.maddrs), node_id=DHTID(key + 1 if key % 2 == 0 else key - 1)
        )
        try:
            lie = now_peer(2, "0:12", state="offline")
            answer = DictionaryDHTValue(maxsize=1)
            answer.store(identity(2).peer_id, msgpacked(lie.encode(identity(2))), lie.expires_at)
            evil.protocol.storage.store(key, answer, math.inf)
            async with open_node(config, None, (*first.maddrs, *map(str, await p2p.get_visible_maddrs()))) as client:
                view = await SwarmReader(client, [MODEL]).refresh()
            assert [record.peer_id for record in view.peers(MODEL)] == [identity(1).peer_id]
        finally:
            await evil.shutdown()
            await p2p.shutdown()


def msgpacked(value: bytes) -> bytes:
    import msgpack

    return bytes(msgpack.packb(value))


async def test_a_restart_needs_no_bootstrap_node(config: DhtConfig, tmp_path: Path) -> None:
    root = tmp_path / "identities"
    with claim_identity(root) as stays, claim_identity(root) as restarts:
        async with contextlib.AsyncExitStack() as stack:
            bootstrap = contextlib.AsyncExitStack()
            first = await bootstrap.enter_async_context(open_node(config, identity(0)))
            staying = await stack.enter_async_context(open_node(config, stays, first.maddrs))
            describe = lambda: replace(peer(0), peer_id=stays.peer_id, certificate_der=stays.certificate_der)  # noqa: E731
            await stack.enter_async_context(announcing(staying, describe, listing(0)))
            async with open_node(config, restarts, first.maddrs) as node, reading(node) as reader:
                await reader.wait_until(lambda view: bool(view.peers(MODEL)), TIMEOUT_S)
                port = node.maddrs[0].split("/")[4]
            await bootstrap.aclose()
            located = await locate_swarm(replace(config, local=False))
            assert located.how == "known peers" and located.maddrs == staying.maddrs
            async with open_node(config, restarts, located.maddrs) as node, reading(node) as reader:
                assert reader.view.peers(MODEL)
                assert node.maddrs[0].split("/")[4] == port, "a node keeps its port over restarts"


async def test_a_bootstrap_node_that_restarts_finds_its_swarm_again(config: DhtConfig, tmp_path: Path) -> None:
    """Its old peers know it by name and come back to it; a newcomer that knows only it sees the whole swarm."""
    config = replace(config, announce_every_s=3600.0)  # an announcement would bring it back too, but later
    with claim_identity(tmp_path / "identities") as who:
        async with contextlib.AsyncExitStack() as stack:
            async with open_node(config, who) as first:
                address = first.maddrs
                serving = await stack.enter_async_context(open_node(config, identity(1), address))
                await stack.enter_async_context(announcing(serving, lambda: peer(1), listing(1)))
            await until(lambda: serving.neighbours == 0 or not listens_at(address))
            async with open_node(config, who) as again:
                assert again.maddrs == address
                await until(lambda: again.neighbours == 1)
                async with open_node(config, None, address) as newcomer, reading(newcomer) as reader:
                    await reader.wait_until(lambda view: bool(view.peers(MODEL)), TIMEOUT_S)


def listens_at(address: tuple[str, ...]) -> bool:
    port = int(address[0].split("/")[4])
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_daemon_that_dies_is_started_again(config: DhtConfig, caplog: pytest.LogCaptureFixture) -> None:
    async with two_nodes(config) as (first, second), announcing(second, lambda: peer(1)):
        victim = daemon_of(second)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in daemons() and len(daemons()) == 2 and second.neighbours == 1)
        assert "starting it again" in caplog.text
        assert await publish(second, 1, now_peer(1, "0:5"))
        view = await SwarmReader(first, [MODEL]).refresh()
        assert [str(record.span) for record in view.peers(MODEL)] == ["0:5"]


def daemon_of(node: SwarmNode) -> int:
    assert node._daemon is not None
    return int(node._daemon._p2p._child.pid)


async def test_a_frozen_daemon_is_killed_at_the_end(config: DhtConfig) -> None:
    async with open_node(replace(config, stop_timeout_s=0.3), identity(0)) as node:
        os.kill(daemon_of(node), signal.SIGSTOP)
        started = time.monotonic()
    assert time.monotonic() - started < 5


async def test_no_daemon_outlives_a_cancelled_start(config: DhtConfig) -> None:
    async def run() -> None:
        async with open_node(config, identity(0)):
            pytest.fail("it was cancelled before")

    opening = asyncio.create_task(run())
    await until(lambda: bool(daemons()))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not daemons()


async def test_errors_of_the_body_are_raised_as_they_are(config: DhtConfig) -> None:
    with pytest.raises(KeyError):
        async with open_node(config, identity(0)):
            raise KeyError("mine")


async def test_a_swarm_that_is_not_there_is_an_error(config: DhtConfig) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity(1).peer_id}"
    with pytest.raises(SwarmNotFound, match="no node of the swarm answers"):
        async with open_node(config, identity(0), [address]):
            pytest.fail("joined nothing")


async def test_another_node_at_the_address_is_an_error(config: DhtConfig) -> None:
    async with open_node(config, identity(0)) as node:
        wrong = node.maddrs[0].replace(identity(0).peer_id, identity(1).peer_id)
        with pytest.raises(SwarmNotFound):
            async with open_node(config, None, [wrong]):
                pytest.fail("joined an impostor")


async def test_one_dead_address_among_good_ones_does_not_matter(config: DhtConfig) -> None:
    async with open_node(config, identity(0)) as node:
        dead = f"/ip4/127.0.0.1/tcp/1/p2p/{identity(1).peer_id}"
        async with open_node(config, None, [dead, *node.maddrs]) as client:
            assert client.neighbours == 1


@pytest.mark.parametrize(("shift", "said"), [(30.0, "30 s ahead of"), (-30.0, "30 s behind")])
async def test_a_wrong_clock_is_an_error_with_a_remedy(
    config: DhtConfig, monkeypatch: pytest.MonkeyPatch, shift: float, said: str
) -> None:
    async with open_node(config, identity(0)) as node:
        real = time.time
        monkeypatch.setattr(daemon, "local_time", lambda: real() + shift)
        with pytest.raises(SwarmNotFound, match=rf"(?s){said}.*timedatectl"):
            async with open_node(config, None, node.maddrs):
                pytest.fail("joined with a wrong clock")


async def test_a_taken_port_is_an_error(config: DhtConfig) -> None:
    async with open_node(config, identity(0)) as node:
        port = int(node.maddrs[0].split("/")[4])
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use"):
            async with open_node(replace(config, port=port), identity(1)):
                pytest.fail("shared a port")


@pytest.mark.parametrize("host", ["192.0.2.1", "not-an-address"])
async def test_a_host_that_is_not_ours_is_an_error(config: DhtConfig, host: str) -> None:
    with pytest.raises(ConfigError):
        async with open_node(replace(config, host=host), identity(0)):
            pytest.fail("listened elsewhere")


async def test_a_remembered_port_that_was_taken_is_replaced(config: DhtConfig, tmp_path: Path) -> None:
    who = Identity.load_or_create(tmp_path / "identity")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        (tmp_path / "identity" / ports.FILE).write_text(str(taken))
        async with open_node(config, who) as node:
            assert f"/tcp/{taken}/" not in node.maddrs[0]


async def test_an_announced_host_is_the_address(config: DhtConfig) -> None:
    for host, kind in (("198.51.100.7", "ip4"), ("node.example", "dns")):
        async with open_node(replace(config, announce_host=host), identity(0)) as node:
            assert all(maddr.startswith(f"/{kind}/{host}/tcp/") for maddr in node.maddrs) and node.maddrs


async def test_known_peers_are_saved_while_the_node_runs(config: DhtConfig) -> None:
    async with two_nodes(config) as (first, _):
        await until(lambda: first.maddrs[0] in known_peers.load(config.home_folder))


def test_a_client_in_a_thread_of_its_own_under_uvloop(config: DhtConfig) -> None:
    """As client/ does it: the loop is not the main thread's."""
    uvloop = pytest.importorskip("uvloop")
    views: list[SwarmView | BaseException] = []

    async def look() -> None:
        async with open_node(config, identity(0)) as first, open_node(config, None, first.maddrs) as client:
            await first.store(MODELS_KEY, listing_now().encode(identity(0)), listing_now().expires_at)
            views.append(await SwarmReader(client).refresh())

    def listing_now() -> Any:
        return replace(listing(0), expires_at=END)

    END = time.time() + 60

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(look())
        except Exception as error:  # noqa: BLE001  # shown by the assertion below
            views.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(TIMEOUT_S)
    assert len(views) == 1 and isinstance(views[0], SwarmView), views
