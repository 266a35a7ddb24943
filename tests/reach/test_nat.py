"""Two homes behind routers that forward nothing, and two volunteers between them who relay: with real processes in
network namespaces, which are made and removed here. Root, `ip`, `tc` and `nft` are needed; else this is skipped, and
says why.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import Process, nothing_left_over, processes_of, until
from tests.reach.network import PUBLIC, Network, trouble, two_homes

pytestmark = pytest.mark.slow

TOKENS = 200
LINE_MBIT = 100
SHAPED_BAR, UNSHAPED_BAR = 0.9, 0.3
GRPC, DHT, RELAY = 31331, 31330, 31332
FORWARDED = 41000  # of which nobody knows but the test
PEER = re.compile(r"^peer (\S+) serves blocks (\d+:\d+) of (.+) at (\S+)$", re.M)


@dataclass
class Homes:
    """The network with its peers: `one` and `two` relay and serve block 0, `hidden` serves all, from home a."""

    network: Network
    folder: Path
    relays: dict[str, Process]
    hidden: Process
    maddrs: dict[str, str]  # of the relays

    def start(self, place: str, *arguments: str) -> Process:
        """A command in one of the places."""
        home = self.folder / place
        home.mkdir(exist_ok=True)
        return Process(home, *arguments, anew=True, through=self.network.inside(place))

    def run(self, place: str, *arguments: str) -> tuple[int, str, str]:
        """A command to its end: exit code, stdout, stderr."""
        with self.start(place, *arguments) as process:
            return process.wait(120.0), process.stdout, process.stderr

    def serve(self, place: str, blocks: str) -> Process:
        others = [maddr for other, maddr in self.maddrs.items() if other != place]
        join = [option for maddr in others for option in ("--join", maddr)] or ["--new-swarm"]
        return self.start(
            place, "peer", "-v", "serve", "--blocks", blocks, "--threads", "1", "--port", str(GRPC),
            "--dht-port", str(DHT), "--relay-port", str(RELAY), "--relay-mbps", "100000", *join,
        )  # fmt: skip

    @property
    def hidden_id(self) -> str:
        return self.hidden.says(PEER.pattern)[1]

    def ask(self, way: str, place: str = "home-b") -> Process:
        """A long answer of the hidden peer; `way` as for the asker."""
        return self.start(place, "tests.reach.asker", str(TOKENS), self.hidden_id, way, *self.maddrs.values())

    def await_ties(self) -> None:
        """Until the hidden peer is tied to both relays; one that it has lost it avoids for a while."""
        until(lambda: len(self.used("home-a")) == 2, "two ties of the hidden peer", 90.0)

    def used(self, place: str) -> list[str]:
        """The relays to which that place is connected."""
        return [relay for relay in self.relays if self.network.is_connected(place, PUBLIC[relay], RELAY)]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homes]:
    if (reason := trouble()) is not None:
        pytest.skip(f"no network of two homes: {reason}")
    folder = tmp_path_factory.mktemp("homes")
    print("\nmaking network namespaces: two homes, and a public network between them")
    with two_homes() as network:
        homes = Homes(network, folder, {}, None, {})  # type: ignore[arg-type]
        try:
            for place in ("one", "two"):
                homes.relays[place] = homes.serve(place, "0:1")
                homes.maddrs[place] = homes.relays[place].says(r"^join (/\S+)$")[1]
            homes.hidden = homes.serve("home-a", "0:24")
            yield homes
        finally:
            for process in (*homes.relays.values(), homes.hidden):
                if process is not None:
                    process.kill()
            for place in ("one", "two", "home-a", "home-b", "room-a"):
                with nothing_left_over(folder / place):
                    pass
    print("the network namespaces are gone")


def test_a_hidden_peer_is_announced_at_relays(homes: Homes) -> None:
    at = homes.hidden.says(PEER.pattern)[4]
    assert at in {f"{PUBLIC['one']}:{RELAY}", f"{PUBLIC['two']}:{RELAY}"}
    homes.hidden.says("others do not reach port 31331 at 45.77.30.2", on_stderr=True)
    homes.hidden.says("have your router forward TCP port 31331", on_stderr=True)
    homes.hidden.says("so that they come through 2 relays", on_stderr=True)
    homes.relays["one"].says("others reach this machine at 45.77.10.2", on_stderr=True)


def test_its_record_stays_when_its_node_becomes_a_client(homes: Homes) -> None:
    homes.hidden.says("this node of the DHT is a client now", on_stderr=True)

    def seen() -> bool:
        _, out, _ = homes.run("home-b", "client", "status", "--json", "--join", homes.maddrs["two"])
        peers = [peer for model in json.loads(out)["models"] for peer in model["peers"]]
        return homes.hidden_id in {peer["peer_id"] for peer in peers} and len(peers) == 3

    until(seen, "all three peers", 60.0)
    time.sleep(25.0)  # it has announced itself anew
    assert seen()


@pytest.mark.parametrize("end", ["killed", "cut off"])
def test_an_answer_crosses_both_routers_and_survives_its_relay(homes: Homes, end: str) -> None:
    homes.await_ties()
    with homes.ask("relayed") as undisturbed:
        assert undisturbed.wait(120.0) == 0, undisturbed.stderr
    with homes.ask("relayed") as process:
        until(lambda: process.stdout.count("\n") >= TOKENS // 4, "the beginning of an answer")
        (used,) = homes.used("home-b")
        if end == "killed":
            homes.relays[used].send(signal.SIGKILL)
        else:
            homes.network.unplug(used)  # nobody is told
        before = process.stdout.count("\n")
        assert process.wait(120.0) == 0, process.stderr
        assert before < TOKENS, "it was in the middle"
        assert process.stdout == undisturbed.stdout and process.stdout.endswith("end\n")
        print(f"\n{used} was {end} after {before} of {TOKENS} tokens\n{process.stderr}")
    homes.relays[used].kill()
    if end == "cut off":
        homes.network.plug(used)
        (other,) = homes.relays.keys() - {used}
        until(lambda: homes.network.reaches(used, PUBLIC[other], DHT), f"{used} to reach the node of {other}")
    until(lambda: not processes_of(homes.folder / used), f"the end of the p2pd of {used}, which holds its port")
    homes.relays[used] = homes.serve(used, "0:1")
    homes.relays[used].says(PEER.pattern)


def test_two_homes_go_past_their_relays(homes: Homes) -> None:
    """Both routers let in what answers. With the relays gone in the middle, the answer goes on all the same."""
    with homes.ask("relayed") as undisturbed:
        assert undisturbed.wait(120.0) == 0, undisturbed.stderr
    with homes.ask("direct") as process:
        until(lambda: process.stdout.count("\n") >= TOKENS // 4, "the beginning of an answer")
        assert homes.network.is_connected("home-b", PUBLIC["router-a"])
        for place in homes.relays:
            homes.network.unplug(place)
        before = process.stdout.count("\n")
        assert process.wait(120.0) == 0, process.stderr
        assert before < TOKENS, "it was in the middle"
        assert process.stdout == undisturbed.stdout and process.stdout.endswith("end\n")
        assert "is lost" not in process.stderr
    for place in homes.relays:
        homes.network.plug(place)
    for place, other in (("one", "two"), ("two", "one")):
        until(lambda: homes.network.reaches(place, PUBLIC[other], DHT), f"{place} to reach {other}")  # noqa: B023
    homes.await_ties()


def test_a_way_past_the_relays_that_is_cut_leads_back_to_them(homes: Homes) -> None:
    with homes.ask("relayed") as undisturbed:
        assert undisturbed.wait(120.0) == 0, undisturbed.stderr
    try:
        with homes.ask("direct") as process:
            until(lambda: process.stdout.count("\n") >= TOKENS // 4, "the beginning of an answer")
            assert homes.network.is_connected("home-b", PUBLIC["router-a"])
            until(lambda: not homes.used("home-b"), "the relay to be left")
            homes.network.block("home-b", PUBLIC["router-a"])
            before = process.stdout.count("\n")
            until(lambda: homes.used("home-b"), "a relay to be used")
            assert process.wait(120.0) == 0, process.stderr
            assert before < TOKENS, "it was in the middle"
            assert process.stdout == undisturbed.stdout
            print(f"\ncut after {before} of {TOKENS} tokens\n{process.stderr}")
    finally:
        homes.network.unblock("home-b")


def test_two_machines_of_one_home_speak_within_it(homes: Homes) -> None:
    with homes.ask("direct", "room-a") as process:
        until(lambda: process.stdout.count("\n") >= TOKENS // 4, "the beginning of an answer")
        assert homes.network.is_connected("room-a", "10.1.0.2")
        assert process.wait(120.0) == 0, process.stderr


def test_behind_a_router_that_scatters_ports_the_relay_carries_on(homes: Homes) -> None:
    homes.network.scatter("home-b")
    try:
        with homes.ask("direct") as process:
            until(lambda: process.stdout.count("\n") >= TOKENS // 4, "the beginning of an answer")
            assert homes.used("home-b") and not homes.network.is_connected("home-b", PUBLIC["router-a"])
            assert process.wait(120.0) == 0, process.stderr
    finally:
        homes.network.gather("home-b")


def test_doctor_in_a_home_says_that_it_can_serve_through_a_relay(homes: Homes) -> None:
    code, out, error = homes.run("home-b", "peer", "doctor", "--json", "--join", homes.maddrs["two"])
    found = json.loads(out)
    assert code == 0 and found["can_serve"], error
    by_check = {finding["check"]: finding for finding in found["findings"]}
    assert by_check["NAT"]["says"] == "a router translates: others see this machine as 45.77.40.2"
    assert by_check["reach"]["level"] == "warning" and "forward TCP port" in by_check["reach"]["remedy"]
    assert by_check["relay"]["level"] == "ok" and "through a relay, at 45.77." in by_check["relay"]["says"]


def test_what_a_relay_costs(homes: Homes) -> None:
    homes.network.forward(FORWARDED, GRPC)
    relayed = homes.hidden.says(PEER.pattern)[4]
    direct, past = f"{PUBLIC['router-a']}:{FORWARDED}", f"past:{relayed}"
    (certificate,) = homes.folder.glob("home-a/identity-*/tls.pem")
    ratios = {}
    for name, mbit in (("unshaped", 0), (f"{LINE_MBIT} Mbit/s", LINE_MBIT)):
        if mbit:
            homes.network.shape(mbit)
        code, out, error = homes.run(
            "home-b", "tests.reach.throughput", str(certificate), "3" if mbit else "2", direct, relayed, past
        )
        assert code == 0, error
        speeds = {at: statistics.median(each) for at, each in json.loads(out).items()}
        ratios[name] = speeds[relayed] / speeds[direct]
        print(
            f"\n{name}: direct {speeds[direct] / 1e6:.1f} MB/s, through the relay {speeds[relayed] / 1e6:.1f} MB/s,"
            f" ratio {ratios[name]:.2f}; past it {speeds[past] / 1e6:.1f} MB/s,"
            f" ratio {speeds[past] / speeds[direct]:.2f}"
        )
        if mbit:
            homes.network.unshape()
    assert ratios[f"{LINE_MBIT} Mbit/s"] >= SHAPED_BAR
    assert ratios["unshaped"] >= UNSHAPED_BAR
