"""What the page says: the sentence, the grid, the advice; and that strangers' words stay words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dashboard import api
from dashboard.advice import advice
from dashboard.config import DashboardConfig
from dashboard.events import Event, changes
from dashboard.grid import CROSS, MAX_COLUMNS, PEERS_SHOWN, grid
from dashboard.health import Health
from dashboard.page import Page, join_command, page, sentence
from dashboard.words import count, duration, milliseconds, number, without_addresses
from protocol.errors import ConfigError
from tests.dashboard.support import HOSTILE, NOW, health, peer

NAMED = "/dns/swarm.example.org/tcp/31330/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
NUMBERED = NAMED.replace("/dns/swarm.example.org", "/ip4/203.0.113.5")
IP = re.compile(r"203\.0\.113|fe80::")


def html(shown: Page, command: str = "python -m peer serve") -> str:
    templates = Path(__file__).parents[2] / "dashboard" / "templates"
    environment = Environment(loader=FileSystemLoader(templates), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("live.html").render(page=shown, command=command, knows_address=False)


@pytest.mark.parametrize(
    ("spans", "silent", "expected"),
    [
        (("0:24", "0:12", "16:24"), "", "tiny: all 24 blocks served, weakest 12:16 by one peer; 80 tokens/s free"),
        (("0:24", "0:24"), "", "tiny: all 24 blocks served, each by two peers; 160 tokens/s free"),
        (("0:9", "15:24"), "", "tiny: 18 of 24 blocks served, 9:15 by no peer"),
        (("0:9", "9:15", "15:24"), "p1", "tiny: 18 of 24 blocks served, 9:15 by no peer that answers"),
        (("0:24",), "p0", "tiny: none of its 24 blocks is served"),
    ],
)
def test_the_sentence(spans: tuple[str, ...], silent: str, expected: str) -> None:
    (model,) = health(*(peer(f"p{i}", span) for i, span in enumerate(spans)), silent=silent).models
    assert sentence(model) == expected


def test_the_page_begins_with_what_matters() -> None:
    assert page(Health(), (), NOW).tone == "idle"
    assert "No swarm" in page(Health(), (), NOW).sentence
    assert page(Health(as_of=NOW), (), NOW).sentence == "This swarm serves no model yet."
    assert page(health(peer("a", "0:24")), (), NOW).tone == "thin"
    assert page(health(peer("a", "0:24"), peer("b", "0:24")), (), NOW).tone == "good"
    assert page(health(peer("a", "0:12")), (), NOW).tone == "bad"


def test_a_swarm_that_does_not_answer_is_not_called_healthy() -> None:
    shown = page(health(peer("a", "0:24"), peer("b", "0:24")), (), NOW + 600, is_stale=True)
    assert (shown.tone, shown.sentence) == ("bad", "This page has not seen the swarm for 10 min.")


def test_the_grid_is_read_without_colours() -> None:
    (model,) = health(peer("a", "0:4", n_blocks=8), peer("b", "2:8", n_blocks=8), silent="b").models
    shown = grid(model)
    assert ["".join(cell.glyph for cell in row.cells) for row in shown.rows] == ["■■■■····", "··" + 6 * CROSS]
    assert "".join(cell.glyph for cell in shown.counts) == "11110000"
    assert [row.text for row in shown.rows] == ["blocks 0:4: serves", "blocks 2:8: does not answer"]


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_large_models_are_folded(blocks: tuple[int, int]) -> None:
    n_blocks, start = blocks
    (model,) = health(peer("a", f"{start}:{n_blocks}", n_blocks=n_blocks)).models
    shown = grid(model)
    assert len(shown.ticks) == len(shown.counts) == len(shown.rows[0].cells) <= MAX_COLUMNS
    drawn = [cell.style for cell in shown.rows[0].cells]
    assert drawn[-1] in ("serving", "part")
    assert (shown.counts[0].style == "gap") == (start > 0)
    assert drawn.count("part") <= 1


def test_of_many_peers_those_with_trouble_are_shown() -> None:
    peers = [peer(f"p{index}", "0:24") for index in range(PEERS_SHOWN + 50)]
    (model,) = page(health(*peers, silent="p149 p140"), (), NOW).models
    assert len(model.peers) == len(model.grid.rows) == PEERS_SHOWN
    assert [line.name for line in model.peers[-2:]] == ["p140", "p149"]
    assert model.more == 50


def test_what_strangers_write_stays_text_and_tells_no_address() -> None:
    evil = peer("a", "0:24", public_name=HOSTILE, contact=HOSTILE)
    found = health(evil, name=HOSTILE)
    before = health(evil, silent="a", name=HOSTILE)
    shown = html(page(found, changes(before, found), NOW), join_command(found, None))
    assert "<img" not in shown
    assert "onerror" in shown, "it is shown, as text"
    assert "{{7*7}}" in shown
    assert not IP.search(shown)
    assert not IP.search(json.dumps(api.swarm(found, NOW)))


def test_no_address_of_a_peer_is_in_what_programs_get() -> None:
    assert "203.0.113" not in json.dumps(api.swarm(health(peer("a", "0:24")), NOW))


def test_claims_are_marked() -> None:
    found = api.swarm(health(peer("a", "0:24", contact="zoe@example.org")), NOW)
    assert found["models"][0]["peers"][0]["claims"] == {
        "public_name": "a", "contact": "zoe@example.org", "tokens_served": 1234, "up_s": 7200.0,
    }  # fmt: skip
    shown = html(page(health(peer("a", "0:24")), (), NOW))
    claims = shown[shown.index('<p class="mark">') :]
    assert "by its own account" in claims
    assert re.search(r"1.234 tokens", claims)


def test_advice_names_the_remedy() -> None:
    private = peer("b", "0:24", addresses=("192.168.1.4:4200",))
    strange = peer("c", "0:24", wire_version=99)
    lost = peer("a", "0:24", addresses=("8.8.8.8:4200",))
    found = list(advice(health(lost, private, strange, silent="a b").peers))
    assert ["announces an address" in item.trouble for item in found] == [True, False, False]
    assert "--announce-host" in found[0].remedy
    assert "a cannot be reached" in found[1].trouble
    assert "another version" in found[2].trouble
    assert list(advice(health(peer("a", "0:24")).peers)) == []


def test_the_command_is_the_very_command() -> None:
    one = health(peer("a", "0:24"))
    assert join_command(one, None) == "python -m peer serve"
    assert join_command(one, NAMED) == f"python -m peer serve --join {NAMED}"


def test_no_address_is_told_that_is_a_number() -> None:
    assert DashboardConfig(join=(NUMBERED, NAMED)).shown_join == NAMED
    assert DashboardConfig(join=(NUMBERED,)).shown_join is None
    with pytest.raises(ConfigError, match="must not hold an IP address"):
        DashboardConfig(public_join=NUMBERED)


@pytest.mark.parametrize(
    "text",
    [
        "203.0.113.5",
        "at 203.0.113.5:80",
        "fe80::1",
        "[2001:db8::2]:443",
        "2001:db8:0:0:1:2:3:4",
        "::1",
        "::ffff:1.2.3.4",
    ],
)
def test_addresses_are_made_unreadable(text: str) -> None:
    assert re.fullmatch(r"(at )?\[?\(address\)\]?(:\d+)?", without_addresses(text))


@pytest.mark.parametrize("text", ["potluck/0.1.0", "12:16", "0:24", "Zoë's laptop", "at 12:30:15", "v1.2.3"])
def test_what_is_no_address_stays(text: str) -> None:
    assert without_addresses(text) == text


def test_words() -> None:
    assert (count(1, "peer"), count(2, "peer"), count(40, "peer")) == ("one peer", "two peers", "40 peers")
    assert (duration(5), duration(600), duration(7200), duration(3e5)) == (
        "under a minute",
        "10 min",
        "2 h",
        "3 days",
    )
    assert (number(0), number(0.423), number(41.4), number(12345)) == ("0", "0.42", "41", "12\u202f345")
    assert (milliseconds(None), milliseconds(0.42), milliseconds(12.3), milliseconds(1500)) == (
        "?", "0.4 ms", "12 ms", "1.5 s",
    )  # fmt: skip


def test_what_happened() -> None:
    a, b = peer("a", "0:12"), peer("b", "12:24")
    whole, lost, gone = health(a, b), health(a, b, silent="b"), health(a)
    assert changes(Health(), whole) == []
    assert [(e.kind, e.text) for e in changes(whole, lost)] == [
        ("gap", "blocks 12:24 have no peer"),
        ("silent", "b (blocks 12:24) does not answer"),
    ]
    assert [e.text for e in changes(lost, gone)] == ["b (blocks 12:24) is gone: it said nothing more"]
    assert [e.kind for e in changes(gone, whole)] == ["whole", "joined"]
    assert [e.kind for e in changes(lost, whole)] == ["whole", "back"]
    assert [e.text for e in changes(whole, health(a, peer("b", "10:22")))][-1] == "b moved from blocks 12:24 to 10:22"
    assert changes(whole, whole) == []
    assert [e.kind for e in changes(whole, Health(as_of=NOW))] == ["gap"]


def test_every_event_has_a_sign() -> None:
    kinds = ("gap", "silent", "left", "draining", "moved", "joined", "back", "whole")
    shown = page(health(peer("a", "0:24")), [Event(NOW, kind, "m", "t") for kind in kinds], NOW)
    assert len(shown.events) == len(kinds)
