"""What the tests of the health page share: peers that need no machine, and swarms of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dashboard.health import Health, Reach, Since, assess
from dht.record import ModelRecord, PeerRecord
from dht.view import SwarmView
from protocol.limits import WIRE_VERSION
from protocol.span import Span

MODEL = "f" * 32
NOW = 1_800_000_000.0
HOSTILE = "<img src=x onerror=alert(1)>\"'`{{7*7}} & 203.0.113.5 fe80::1"


def peer(name: str, span: str, *, n_blocks: int = 24, **values: Any) -> PeerRecord:
    """A peer of a model of `n_blocks`, whose id ends with `name`."""
    known: dict[str, Any] = {
        "state": "online",
        "addresses": ("203.0.113.9:4200",),
        "certificate_der": b"",
        "fingerprint": MODEL,
        "step_ms": 12.0,
        "tokens_per_s": 80.0,
        "kv_tokens_left": 3000,
        "kv_tokens_total": 4000,
        "tokens_served": 1234,
        "dtype": "float32",
        "software": "potluck/0.1.0",
        "wire_version": WIRE_VERSION,
        "public_name": name,
        "started_at": NOW - 7200,
        "sequence": int(NOW * 1e9),
    }
    return PeerRecord(peer_id=f"Qm{name}", span=Span.parse(span), n_blocks=n_blocks, **(known | values))


def view(*peers: PeerRecord, name: str = "tiny") -> SwarmView:
    """A swarm of one model."""
    if not peers:
        return SwarmView(as_of=NOW)
    model = ModelRecord("", name, MODEL, peers[0].n_blocks)
    return SwarmView(as_of=NOW, models=(model,), peers_by_model=MappingProxyType({MODEL: peers}))


ANSWERS = Reach(answers=True, rtt_ms=20.0)
SILENT = Reach(answers=False)


def health(
    *peers: PeerRecord,
    silent: str = "",
    used: Mapping[str, float] | None = None,
    since: Since | None = None,
    name: str = "tiny",
) -> Health:
    """Of a swarm of one model, whose peers answer but for those named in `silent`."""
    names = silent.split()
    reach = {p.peer_id: SILENT if p.peer_id.removeprefix("Qm") in names else ANSWERS for p in peers}
    return assess(view(*peers, name=name), reach, used or {}, since or {})
