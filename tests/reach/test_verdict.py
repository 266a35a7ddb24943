"""What others say, and what follows from it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dht.record import PeerRecord
from peer.reach.dialback import Answer
from peer.reach.quota import Quota
from peer.reach.verdict import Position, choose_relay, helpers, judge, settle
from peer.reach.whereabouts import told
from protocol.span import Span

PORT, RELAY = 31331, 31332
HOME = "45.77.30.2"


def says(where: str, *reached: int, host: str = HOME) -> Answer:
    """What a peer of that block of addresses said."""
    return Answer(where, host, frozenset(reached))


def other(number: int, *addresses: str, relay_port: int = 0, relayed: int = 0) -> PeerRecord:
    return PeerRecord(
        peer_id=f"peer-{number}",
        fingerprint="f",
        n_blocks=1,
        span=Span(0, 1),
        state="online",
        addresses=addresses or (f"45.77.{number}.2:31331",),
        certificate_der=b"",
        relay_port=relay_port,
        relay_places=4 if relay_port else 0,
        relayed=relayed,
    )


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([says("a", PORT)], "yes"),
        ([says("a")], "no"),
        ([says("a", PORT), says("b", PORT)], "yes"),
        ([says("a"), says("b")], "no"),
        ([says("a", PORT), says("b")], "unclear"),
        ([says("a", PORT), says("b", PORT), says("c")], "yes"),
        ([says("a"), says("b"), says("c", PORT)], "no"),
        ([says("a"), says("a"), says("a"), says("b", PORT), says("c", PORT)], "yes"),  # one voice for a block
        ([says("a", RELAY), says("b", RELAY)], "no"),
    ],
)
def test_two_that_agree_decide(answers: list[Answer], verdict: str) -> None:
    assert judge(answers, PORT) == {HOME: verdict}


def test_each_address_has_its_own_verdict() -> None:
    six = "2001:db8::5"
    answers = [says("a"), says("b"), says("c", PORT, host=six), says("d", PORT, host=six)]
    assert judge(answers, PORT) == {HOME: "no", six: "yes"}


def test_nobody_to_ask() -> None:
    assert settle([], PORT, RELAY, ["192.168.1.4", "127.0.0.1"]) == Position(("192.168.1.4",))
    assert settle([], PORT, RELAY, ["127.0.0.1"]) == Position(("127.0.0.1",))


def test_one_machine_alone() -> None:
    """What others on the same machine say tells nothing about others; where all live there, it is all there is."""
    near = says("127.0.0.0/24", PORT, RELAY, host="127.0.0.1")
    assert settle([near], PORT, RELAY, ["127.0.0.1"]) == Position(("127.0.0.1",), relays=True)
    assert settle([near], PORT, RELAY, ["192.168.1.4", "127.0.0.1"]) == Position(("192.168.1.4",))


def test_a_local_network_is_announced_until_somebody_is_met_beyond_it() -> None:
    near = says("192.168.1.0/24", PORT, RELAY, host="192.168.1.4")
    position = settle([near], PORT, RELAY, ["192.168.1.4", "172.17.0.1"])
    assert position.hosts == ("192.168.1.4",) and not position.needs_relay and position.relays
    position = settle([near, says("a"), says("b")], PORT, RELAY, ["192.168.1.4"])
    assert position.hosts == () and position.needs_relay and position.is_hidden and not position.relays


def test_a_router_that_forwards_is_found_out() -> None:
    position = settle([says("a", PORT), says("b", PORT)], PORT, RELAY, ["192.168.1.4"])
    assert position.hosts == (HOME,) and not position.needs_relay and not position.relays, "but not the relay's port"
    assert settle([says("a", PORT, RELAY), says("b", PORT, RELAY)], PORT, RELAY, []).relays
    assert not settle([says("a", PORT, RELAY), says("b", PORT, RELAY)], PORT, 0, []).relays


def test_where_it_is_unclear_both_ways_are_announced() -> None:
    position = settle([says("a", PORT), says("b")], PORT, RELAY, [])
    assert position.hosts == (HOME,) and position.needs_relay and not position.is_hidden


def test_ipv6_alone_is_not_enough_for_all() -> None:
    six = "2a01:4f8::5"
    answers = [says("a"), says("b"), says("c", PORT, host=six), says("d", PORT, host=six)]
    position = settle(answers, PORT, RELAY, [])
    assert position.hosts == (six,) and position.needs_relay and not position.is_hidden


def test_a_host_that_the_user_named() -> None:
    named = ["home.example"]
    assert settle([says("a", PORT), says("b", PORT)], PORT, RELAY, named, {HOME}).hosts == ("home.example",)
    refuted = settle([says("a"), says("b")], PORT, RELAY, named, {HOME})
    assert refuted.hosts == () and refuted.needs_relay
    elsewhere = settle([says("a"), says("b")], PORT, RELAY, named, {"45.77.99.9"})
    assert elsewhere == Position(("home.example",), relays=True), "nobody saw us come from there: it is believed"


def test_whom_to_ask() -> None:
    peers = [other(n) for n in range(1, 9)] + [other(20, "45.77.1.9:1"), other(21, "[2a01:4f8::1]:1", "45.77.9.9:1")]
    peers.append(other(22, "45.77.10.2:1", relayed=1))
    chosen = helpers(peers, "peer-1", random.Random(1))
    assert "peer-1" not in {helper.record.peer_id for helper in chosen}
    assert "peer-22" not in {helper.record.peer_id for helper in chosen}, "through a relay it would not see us"
    four = [helper for helper in chosen if not helper.at.startswith("[")]
    assert len(four) == 5 and len({helper.block for helper in four}) == 5
    assert [helper.at for helper in chosen if helper.at.startswith("[")] == ["[2a01:4f8::1]:1"]
    near = [other(1), other(2, "45.77.1.8:1")]
    assert len(helpers(near, "me", random.Random(1))) == 2, "better the same block twice than one peer alone"


def test_which_relay() -> None:
    rng = random.Random(1)
    relays = [other(n, relay_port=RELAY) for n in (1, 2)] + [other(3), other(4, "45.77.1.9:1", relay_port=RELAY)]
    for _ in range(20):
        chosen = choose_relay(relays, "me", [relays[0]], (), rng)
        assert chosen is relays[1], "not of the same block of addresses"
    assert choose_relay(relays, "me", [relays[0]], ["peer-2"], rng) is relays[3], "if there is no other"
    assert choose_relay(relays, "peer-4", [relays[0], relays[1]], (), rng) is None
    assert (
        choose_relay([replace(relays[0], relay_places=0), replace(relays[1], state="draining")], "me", (), (), rng)
        is None
    )


def test_a_person_is_told_what_to_do() -> None:
    hidden = Position((), {HOME: "no"}, needs_relay=True)
    for relays, announced, words in [
        ((), None, ["no peer relays for this one", f"forward TCP port {PORT}", "--announce-host"]),
        (("45.77.1.1:1",), None, ["come through a relay", f"forward TCP port {PORT}"]),
        (("45.77.1.1:1", "45.77.2.1:1"), "home.example", ["at home.example", "through 2 relays"]),
    ]:
        sentence = told(hidden, relays, PORT, announced)
        assert all(word in sentence for word in words) and "\n" not in sentence
    assert told(Position((HOME,), {HOME: "yes"}), (), PORT, None) == f"others reach this machine at {HOME}"


def test_a_quota_is_for_each_block_and_for_all() -> None:
    quota = Quota(per_block=2, overall=3, window_s=60.0)
    assert [quota.admit("a", 1.0), quota.admit("a", 2.0)] == [0.0, 0.0]
    assert quota.admit("a", 3.0) == 57.0
    assert quota.admit("b", 3.0) == 0.0
    assert quota.admit("c", 3.0) == 57.0
    assert quota.admit("a", 60.0) == 0.0
