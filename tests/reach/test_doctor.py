"""`doctor`: each finding, its remedy, and what they come to; and the whole of it beside a real node of a swarm."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dht.config import DhtConfig
from dht.node import open_node
from dht.record import MODELS_KEY, PeerRecord
from dht.view import SwarmReader
from peer import findings
from peer.cli import cli
from peer.config import PeerConfig
from peer.doctor import examine, own_hosts
from peer.findings import Finding, can_serve
from peer.reach.verdict import Position
from peer.report import render
from protocol.limits import WIRE_VERSION
from tests.dht import support
from tests.harness import identity
from tests.reach.support import answering

HOME = "45.77.30.2"
GIB = findings.GIB


@pytest.mark.parametrize(
    ("finding", "level", "words"),
    [
        (findings.addresses(["127.0.0.1", "::1"]), "warning", "no network"),
        (findings.addresses(["127.0.0.1", "192.168.1.4"]), "ok", "local network only"),
        (findings.addresses(["45.77.1.1", "192.168.1.4"]), "ok", "45.77.1.1 is of the internet"),
        (findings.port("port", 31331, None), "ok", "--port 31331 is free"),
        (findings.port("port", 0, None), "ok", "any free one"),
        (findings.port("port", 31331, "cannot listen"), "fault", "another --port"),
        (findings.memory(8 * GIB, 16 * GIB), "ok", "8.0 GiB of 16.0"),
        (findings.memory(GIB, 16 * GIB), "warning", "--quantization"),
        (findings.memory(GIB // 4, 16 * GIB), "fault", "half a GiB"),
        (findings.gpu([], None, 8), "ok", "8 processor cores"),
        (findings.gpu(["H200: 130.0 GiB of 139.0 are free"], "cuda", 8), "ok", "H200"),
        (findings.gpu([], "cuda:1", 8), "fault", "driver"),
        (findings.directory(None, 0, 0), "warning", "--join"),
        (findings.directory("the given address", 1, 2), "ok", "1 node, 2 peers"),
        (findings.clock(None, 3.0), "ok", "nobody"),
        (findings.clock(0.4, 3.0), "ok", "within 3 s"),
        (findings.clock(-40.0, 3.0), "fault", "40 s ahead of"),
        (findings.nat(Position(()), []), "ok", "nobody"),
        (findings.nat(Position((), {HOME: "no"}), ["192.168.1.4"]), "ok", "a router translates"),
        (findings.nat(Position((HOME,), {HOME: "yes"}), [HOME]), "ok", "none"),
        (findings.relay(Position((), {HOME: "no"}, True), 0, None, ""), "fault", "no peer of this swarm relays"),
        (findings.relay(Position((), {HOME: "no"}, True), 2, None, "none took it"), "fault", "none took it"),
        (findings.relay(Position((), {HOME: "no"}, True), 2, "45.77.1.1:5", ""), "ok", "at 45.77.1.1:5"),
        (findings.relay(Position((HOME,), {HOME: "unclear"}, True), 0, None, ""), "warning", "no peer"),
        (findings.relay(Position((HOME,), {HOME: "yes"}, relays=True), 0, None, ""), "ok", "can relay for others"),
        (findings.relay(Position((HOME,), {HOME: "yes"}), 0, None, ""), "ok", "forward --relay-port"),
        (findings.relay(Position(()), 1, None, ""), "ok", "1 peer"),
    ],
)
def test_a_finding_says_what_is_and_what_to_do(finding: Finding, level: str, words: str) -> None:
    assert finding.level == level
    assert words in f"{finding.says} {finding.remedy}"
    assert finding.remedy or level == "ok"
    assert can_serve([finding]) == (level != "fault")


def test_each_address_has_its_line() -> None:
    six = "2a01:4f8::5"
    lines = findings.reach(Position((six,), {HOME: "no", six: "yes"}, True), 31331, 5)
    assert [(line.level, HOME in line.says) for line in lines] == [("warning", True), ("ok", False)]
    assert "forward TCP port 31331" in lines[0].remedy
    (line,) = findings.reach(Position((HOME,), {HOME: "unclear"}, True), 31331, 5)
    assert line.level == "warning"
    assert [line.level for line in findings.reach(Position(()), 31331, 0)] == ["ok"]


def test_people_see_each_line_and_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    found = [findings.clock(40.0, 3.0), findings.memory(8 * GIB, 16 * GIB)]
    render(found)
    shown = " ".join(capsys.readouterr().out.split())
    for finding in found:
        assert finding.says in shown and finding.remedy in shown
    assert "cannot serve yet" in shown
    render(found[1:])
    assert "can serve" in capsys.readouterr().out


def test_this_machine_has_addresses() -> None:
    assert "127.0.0.1" in own_hosts()


def test_wrong_use_is_exit_code_2() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--port", "70000"])
    assert result.exit_code == 2 and "--port" in result.output.replace("port must", "--port must")


@pytest.fixture
def config(tmp_path: Path) -> DhtConfig:
    return DhtConfig(host="127.0.0.1", home=str(tmp_path), lan=False, local=False)


def peer(index: int, **values: Any) -> PeerRecord:
    """A record of peer number `index`, as of now."""
    now, who = time.time(), identity(index)
    record = support.peer(0, sequence=1, expires_at=now + 50, started_at=now, wire_version=WIRE_VERSION, **values)
    return replace(record, peer_id=who.peer_id, certificate_der=who.certificate_der)


async def test_beside_a_swarm(config: DhtConfig) -> None:
    async with open_node(config, identity(0)) as node, answering(0) as port:
        record = peer(0, addresses=(f"127.0.0.1:{port}",))
        until = record.expires_at
        listing = replace(support.listing(0, expires_at=until), signer=identity(0).peer_id)
        assert await node.store(record.key(1), record.encode(identity(0)), until)
        assert await node.store(MODELS_KEY, listing.encode(identity(0)), until)
        joining = replace(config, join=node.maddrs[:1])
        found = await examine(PeerConfig(host="127.0.0.1"), joining)
    by_check = {finding.check: finding for finding in found}
    assert can_serve(found)
    assert set(by_check) == {"addresses", "ports", "memory", "GPU", "DHT", "clock", "NAT", "reach", "relay"}
    assert "1 peer" in by_check["DHT"].says and by_check["clock"].level == "ok"


async def test_without_a_swarm(config: DhtConfig) -> None:
    found = await examine(PeerConfig(host="127.0.0.1", relay=False), config)
    assert can_serve(found) and found[-1].check == "DHT" and found[-1].level == "warning"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        join = (f"/ip4/127.0.0.1/tcp/1/p2p/{identity(0).peer_id}",)
        found = await examine(PeerConfig(host="127.0.0.1", port=port), replace(config, join=join))
    assert [finding.check for finding in found if finding.level == "fault"] == ["ports", "DHT"]


async def test_a_node_that_nobody_can_dial_lives_on_as_a_client(config: DhtConfig, tmp_path: Path) -> None:
    quick = replace(config, reconnect_every_s=0.2)
    other = replace(quick, home=str(tmp_path / "b"))
    async with open_node(config, identity(0)) as there, open_node(other, identity(1), there.maddrs[:1]) as node:
        assert node.maddrs
        node.set_dialable(False)
        async with asyncio.timeout(15.0):
            while node.maddrs:
                await asyncio.sleep(0.05)
            record = peer(1)
            while not await node.store(record.key(1), record.encode(identity(1)), record.expires_at):
                await asyncio.sleep(0.1)
        assert node.peer_id == identity(1).peer_id
        reader = SwarmReader(there, [record.fingerprint])
        view = await reader.refresh()
        assert view.peer(node.peer_id) is not None, "its record is where others find it"
        node.set_dialable(True)
        async with asyncio.timeout(15.0):
            while not node.maddrs:
                await asyncio.sleep(0.05)
