"""The numbers in SECURITY.md are those of the code."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from peer.config import PeerConfig
from peer.reach.switchboard import RelayLimits
from protocol.settings import settings

PAGE = (Path(__file__).parents[1] / "SECURITY.md").read_text()
ROW = re.compile(r"^\| ([^|]+) \| `([^`|]+)` \| ([^|]+) \| ([^|]+) \|$", re.M)
ROWS = [match.groups() for match in ROW.finditer(PAGE)]
UNITS = {
    "": 1,
    "%": 0.01,
    " s": 1,
    " per s": 1,
    " KiB": 1 << 10,
    " MiB": 1 << 20,
    " KiB per s": 1 << 10,
    " Mbit per s": 1,
}
WORDS = {"from free memory": None, "no limit": None}


def value(where: str) -> Any:
    """The default of a flag of the peer, or what a name means."""
    if where.startswith("--"):
        (setting,) = (setting for setting in settings(PeerConfig) if setting.flag == where)
        return setting.default
    parts = where.split(".")
    at = next(index for index, part in enumerate(parts) if not part.islower())
    found: Any = import_module(".".join(parts[:at]))
    for name in parts[at:]:
        found = getattr(found, name)
        found = found() if isinstance(found, type) else found
    return found


def number(text: str, where: str) -> float | None:
    if text in WORDS:
        return WORDS[text]
    match = re.fullmatch(r"(\d+)(.*)", text)
    assert match is not None, text
    unit = "" if where.endswith("mib-s") else match[2]  # whose unit is the flag's own
    return float(match[1]) * UNITS[unit]


@pytest.mark.parametrize(("what", "where", "shown", "happens"), ROWS, ids=[row[1] for row in ROWS])
def test_each_limit_is_what_the_page_says(what: str, where: str, shown: str, happens: str) -> None:
    stated, actual = number(shown, where), value(where)
    if stated is None or actual is None:
        assert stated is actual, what
    else:
        assert math.isclose(stated, actual), f"{what}: {shown} on the page, {actual} in {where}"
    assert happens.strip()


def test_every_limit_of_a_peer_is_on_the_page() -> None:
    """Those that a client meets: a new setting of that kind has to be told."""
    bounded = ("client", "address", "max_", "message_", "journal_", "kv_", "session_idle", "resume")
    flags = {s.flag for s in settings(PeerConfig) if s.name.startswith(bounded)} - {"--max-batch"}
    assert flags <= {where for _, where, *_ in ROWS}
    assert len(ROWS) > 55


def test_every_limit_of_a_relay_is_on_the_page() -> None:
    limits = {f"peer.reach.switchboard.RelayLimits.{limit.name}" for limit in fields(RelayLimits)}
    assert limits | {"--relay-mbps"} <= {where for _, where, *_ in ROWS}


def test_what_strangers_can_read_is_said_plainly() -> None:
    assert "Prompts and answers can be recovered from hidden states" in PAGE
