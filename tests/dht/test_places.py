"""Where swarms are found: addresses, state files, lists, and in which order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from dht import known_peers, lan, local_swarm, locate
from dht.config import DhtConfig
from dht.locate import Located, locate_swarm, read_bootstrap_list
from dht.maddr import EXAMPLE, Maddr, best_first
from protocol.errors import ConfigError, SwarmNotFound
from protocol.join_token import JoinToken

IDS = [f"Qm{character * 44}" for character in "abcdef"]


def maddr(index: int = 0, port: int = 4201, host: str = "127.0.0.1") -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{IDS[index]}"


@contextlib.contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


# ---------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "text",
    [EXAMPLE, f"/ip6/2001:db8::1/tcp/1/p2p/{IDS[0]}", f"/dns4/swarm.example/tcp/65535/p2p/{IDS[0]}", f" {EXAMPLE}\n"],
)
def test_addresses(text: str) -> None:
    assert str(Maddr.require(text)) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "203.0.113.5:4201",
        "/ip4/203.0.113.5/tcp/4201",
        f"/ip4/203.0.113.5/tcp/0/p2p/{IDS[0]}",
        f"/ip4/203.0.113.5/tcp/70000/p2p/{IDS[0]}",
        f"/ip4/203.0.113/tcp/1/p2p/{IDS[0]}",
        f"/ip4/::1/tcp/1/p2p/{IDS[0]}",
        f"/ip6/127.0.0.1/tcp/1/p2p/{IDS[0]}",
        "/ip4/203.0.113.5/tcp/4201/p2p/short",
        f"/ip4/203.0.113.5/udp/4201/p2p/{IDS[0]}",
        EXAMPLE + "/p2p-circuit",
        "-flag",
    ],
)
def test_other_text_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=EXAMPLE.replace("/", "/")):
        Maddr.require(text)


def test_addresses_for_others_come_first() -> None:
    assert best_first([maddr(0), "nonsense", maddr(0, host="192.168.0.9")]) == (maddr(0, host="192.168.0.9"), maddr(0))


def test_a_bad_port_or_expiry_is_an_error() -> None:
    for values in ({"port": 70000}, {"port": -1}, {"expiry_s": 90.0}, {"expiry_s": 0.0}):
        with pytest.raises(ConfigError):
            DhtConfig(**values)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------- known peers


def test_known_peers_are_kept_last_met_first(tmp_path: Path) -> None:
    known_peers.remember(tmp_path, [maddr(0), maddr(1)], now=1.0)
    known_peers.remember(tmp_path, [maddr(1, port=5), "nonsense"], now=2.0)
    assert known_peers.load(tmp_path) == (maddr(1, port=5), maddr(0))


def test_known_peers_are_few_and_forgotten_in_time(tmp_path: Path) -> None:
    known_peers.remember(tmp_path, [maddr(0)], now=0.0)
    known_peers.remember(tmp_path, [maddr(1)], now=known_peers.FORGET_AFTER_S)
    assert known_peers.load(tmp_path) == (maddr(1),)
    alphabet = "23456789abcdefgh"
    many = [f"/ip4/10.0.0.1/tcp/1/p2p/Qm{(a + b) * 22}" for a in alphabet for b in alphabet]
    known_peers.remember(tmp_path, many, now=known_peers.FORGET_AFTER_S + 1)
    assert len(known_peers.load(tmp_path)) == known_peers.MAX_KNOWN


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"peers": 3}',
        b'{"peers": [1, {"maddr": 1}, {"maddr": "x", "seen": 1}]}',
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / known_peers.FILE).write_bytes(content)
    assert known_peers.load(tmp_path) == ()
    known_peers.remember(tmp_path, [maddr(0)], now=1.0)
    assert known_peers.load(tmp_path) == (maddr(0),)


def test_a_damaged_file_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / known_peers.FILE).write_bytes(b"{")
    known_peers.load(tmp_path)
    assert known_peers.FILE in caplog.text


def test_an_unwritable_home_is_only_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    known_peers.remember(tmp_path / "home" / "deeper", [maddr(0)], now=1.0)
    assert "cannot be saved" in caplog.text


# ---------------------------------------------------------------------------- the swarm of this machine


def test_a_running_node_is_found_until_it_ends(tmp_path: Path) -> None:
    with local_swarm.published(tmp_path, [maddr(0)], "peer"), local_swarm.published(tmp_path, [maddr(1)], "bootstrap"):
        assert [node.maddrs for node in local_swarm.find(tmp_path)] == [(maddr(1),), (maddr(0),)]
    assert local_swarm.find(tmp_path) == ()
    assert not list((tmp_path / local_swarm.FOLDER).iterdir())


def test_private_swarms_are_found_by_their_members_alone(tmp_path: Path) -> None:
    token = JoinToken.new()
    with local_swarm.published(tmp_path, [maddr(0)], "peer", token.name):
        assert local_swarm.find(tmp_path) == ()
        assert [node.maddrs for node in local_swarm.find(tmp_path, token.name)] == [(maddr(0),)]
    known_peers.remember(tmp_path, [maddr(0)], now=1.0, swarm=token.name)
    assert known_peers.load(tmp_path) == () and known_peers.load(tmp_path, token.name) == (maddr(0),)


def entry(folder: Path, name: str = "x.json", **values: object) -> Path:
    state = {
        "maddrs": [maddr(0)],
        "role": "peer",
        "machine": socket.gethostname(),
        "pid": os.getpid(),
        "started_at": psutil.Process().create_time(),
    }
    path = folder / local_swarm.FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**state, **values}))
    return path


def test_the_entry_of_an_ended_process_is_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    path = entry(tmp_path, pid=ended.pid)
    assert local_swarm.find(tmp_path) == () and not path.exists()


def test_the_entry_of_a_process_whose_id_is_used_again_is_removed(tmp_path: Path) -> None:
    path = entry(tmp_path, started_at=psutil.Process().create_time() - 3600)
    assert local_swarm.find(tmp_path) == () and not path.exists()


def test_the_entry_of_a_zombie_is_removed(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child:
        started = psutil.Process(child.pid).create_time()
        child.stdout.read()  # at its end the child is exiting, and nobody has waited for it
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            os.sched_yield()
        path = entry(tmp_path, pid=child.pid, started_at=started)
        assert local_swarm.find(tmp_path) == () and not path.exists()


def test_another_machines_entry_is_left_alone(tmp_path: Path) -> None:
    path = entry(tmp_path, machine="another", pid=1)
    assert local_swarm.find(tmp_path) == () and path.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"maddrs": ["x"]},
        {"maddrs": 3},
        {"role": "king"},
        {"pid": -1},
        {"pid": True},
        {"started_at": "x"},
        {"machine": 3},
        {"swarm": 3},
    ],
)
def test_a_damaged_entry_is_removed(tmp_path: Path, values: dict[str, object]) -> None:
    path = entry(tmp_path, **values)
    (path.parent / "other.json").write_bytes(b"\xff")
    assert local_swarm.find(tmp_path) == ()
    assert not list(path.parent.iterdir())


# ---------------------------------------------------------------------------- the bootstrap list


async def test_a_list_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "list"
    path.write_text(f"# nodes\n\n{maddr(0)}  # the first\nnonsense\n{maddr(1)}\n")
    assert await read_bootstrap_list(str(path), DhtConfig()) == (maddr(0), maddr(1))
    assert "nonsense" in caplog.text


async def test_a_missing_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        await read_bootstrap_list(str(tmp_path / "absent"), DhtConfig())


async def test_only_https_is_fetched() -> None:
    for url in ("http://example.com/list", "file:///etc/passwd", "ftp://x"):
        with pytest.raises(ConfigError, match="https"):
            await read_bootstrap_list(url, DhtConfig())


@pytest.mark.parametrize("behaviour", ["silent", "broken", "absent"])
async def test_a_url_that_does_not_answer_is_only_warned_of(
    behaviour: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(request: httpx2.Request) -> httpx2.Response:
        if behaviour == "silent":
            await asyncio.Event().wait()
        if behaviour == "broken":
            raise httpx2.ConnectError("refused")
        return httpx2.Response(404)

    serve_over_https(monkeypatch, answer)
    assert await read_bootstrap_list("https://swarm.example/list", DhtConfig(fetch_timeout_s=0.1)) == ()
    assert "cannot be fetched" in caplog.text


def serve_over_https(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    real = httpx2.AsyncClient
    monkeypatch.setattr(httpx2, "AsyncClient", lambda **kw: real(transport=httpx2.MockTransport(answer), **kw))


async def test_a_fetched_list_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: httpx2.Request) -> httpx2.Response:
        assert str(request.url) == "https://swarm.example/list"
        return httpx2.Response(200, content=f"{maddr(0)}\n".encode() + b"#" * (2 * locate.MAX_LIST_BYTES))

    serve_over_https(monkeypatch, answer)
    assert await read_bootstrap_list("https://swarm.example/list", DhtConfig()) == (maddr(0),)


# ---------------------------------------------------------------------------- the order


@pytest.fixture
def found_on_lan(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the local network is made to answer."""
    answer: list[str] = []

    async def browse(timeout_s: float, swarm: str = "") -> tuple[str, ...]:
        return tuple(answer)

    monkeypatch.setattr(lan, "browse", browse)
    return answer


async def test_the_order_of_places(tmp_path: Path, found_on_lan: list[str]) -> None:
    with listening() as port:
        listed = tmp_path / "list"
        listed.write_text(maddr(1, port))
        known_peers.remember(tmp_path, [maddr(3, port)], now=1.0)
        found_on_lan.append(maddr(4, port))
        full = {"home": str(tmp_path), "join": (maddr(0),), "bootstrap_list": str(listed)}
        with local_swarm.published(tmp_path, [maddr(2, port)], "peer"):
            steps = [
                ({}, Located((maddr(0),), "the given address")),
                ({"join": ()}, Located((maddr(1, port),), "the bootstrap list")),
                ({"join": (), "bootstrap_list": None}, Located((maddr(2, port),), "a node on this machine")),
                (
                    {"join": (), "bootstrap_list": None, "local": False},
                    Located((maddr(3, port),), "known peers"),
                ),
            ]
            for change, expected in steps:
                assert await locate_swarm(DhtConfig(**{**full, **change})) == expected  # type: ignore[arg-type]
        assert await locate_swarm(DhtConfig(**full), join=[maddr(5)]) == Located((maddr(5),), "the given address")  # type: ignore[arg-type]
        (tmp_path / known_peers.FILE).unlink()
        bare = DhtConfig(home=str(tmp_path))
        assert await locate_swarm(bare) == Located((maddr(4, port),), "the local network")
        assert (await locate_swarm(DhtConfig(home=str(tmp_path), new_swarm=True))).maddrs == ()


async def test_no_swarm_is_an_error_that_says_how_to_join(tmp_path: Path, found_on_lan: list[str]) -> None:
    for config in (DhtConfig(home=str(tmp_path)), DhtConfig(home=str(tmp_path), host="127.0.0.1")):
        with pytest.raises(SwarmNotFound, match="--join /ip4/"):
            await locate_swarm(config)


async def test_the_lan_is_searched_only_if_allowed(tmp_path: Path, found_on_lan: list[str]) -> None:
    with listening() as port:
        found_on_lan.append(maddr(0, port))
        for config in (DhtConfig(home=str(tmp_path), lan=False), DhtConfig(home=str(tmp_path), host="127.0.0.1")):
            with pytest.raises(SwarmNotFound):
                await locate_swarm(config)


async def test_places_where_nothing_listens_are_passed_over(tmp_path: Path, found_on_lan: list[str]) -> None:
    with listening() as port:
        pass
    known_peers.remember(tmp_path, [maddr(0, port)], now=1.0)
    with local_swarm.published(tmp_path, [maddr(1, port)], "peer"), pytest.raises(SwarmNotFound):
        await locate_swarm(DhtConfig(home=str(tmp_path)))
    with listening() as port:
        known_peers.remember(tmp_path, [maddr(2, port)], now=2.0)
        assert await locate_swarm(DhtConfig(home=str(tmp_path))) == Located((maddr(2, port),), "known peers")


async def test_a_bad_address_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await locate_swarm(DhtConfig(home=str(tmp_path)), join=["nonsense"])


# ---------------------------------------------------------------------------- the local network


async def test_a_node_is_found_by_mdns_until_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lan, "SERVICE", f"_pt{os.getpid()}._tcp.local.")  # real nodes may run on this network
    address = maddr(0, host="192.0.2.7")
    interfaces = ["127.0.0.1"]
    advertising = asyncio.create_task(lan._advertise([Maddr.require(address)], 1.5, interfaces))
    try:
        found = await lan.browse(5.0, interfaces)
        if advertising.done() or not found:
            pytest.skip("no multicast on the loopback interface")
        assert found == (address,)
    finally:
        advertising.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await advertising
    assert await lan.browse(0.3, interfaces) == ()


async def test_loopback_is_not_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        pytest.fail("advertised")

    monkeypatch.setattr(lan, "_advertise", fail)
    async with lan.advertised([maddr(0)], 1.0):
        pass
