"""What the tests of `dht` share: identities (slow to make), records, and a node that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dht.config import DhtConfig
from dht.record import ModelRecord, PeerRecord, State
from dht.validator import Verifier
from protocol.identity import Identity
from protocol.span import Span

MODEL = "f" * 32
OTHER_MODEL = "e" * 32
N_BLOCKS = 24
NOW = 1_800_000_000.0

_identities: list[Identity] = []


def identity(index: int) -> Identity:
    while len(_identities) <= index:
        _identities.append(Identity.ephemeral())
    return _identities[index]


def peer(index: int = 0, span: str = "0:24", state: State = "online", **values: Any) -> PeerRecord:
    """A record of peer number `index`."""
    who = identity(index)
    defaults: dict[str, Any] = {
        "fingerprint": MODEL,
        "n_blocks": N_BLOCKS,
        "addresses": ("127.0.0.1:5000", "[::1]:5000", "peer.example:443"),
        "kv_tokens_left": 1000,
        "kv_tokens_total": 4000,
        "step_ms": 1.5,
        "tokens_per_s": 640.0,
        "queue_ms": 1.5,
        "rtts_ms": (("QmNear", 2.5), ("QmFar", 80.0)),
        "codecs": ("int8", "none"),
        "dtype": "float32",
        "software": "potluck/0.1.0",
        "public_name": "Zoë's laptop",
        "started_at": NOW - 100,
        "sequence": 1,
        "expires_at": NOW + 60,
    }
    return PeerRecord(
        peer_id=who.peer_id,
        span=Span.parse(span),
        state=state,
        certificate_der=who.certificate_der,
        **{**defaults, **values},
    )


def listing(index: int = 0, **values: Any) -> ModelRecord:
    """A listing by peer number `index`."""
    defaults: dict[str, Any] = {
        "name": "test/model",
        "fingerprint": MODEL,
        "n_blocks": N_BLOCKS,
        "cuts": (4, 8, 16),
        "sequence": 1,
        "expires_at": NOW + 60,
    }
    return ModelRecord(signer=identity(index).peer_id, **{**defaults, **values})


class FakeNode:
    """A `SwarmNode` that stores in a dictionary and has a clock to set."""

    def __init__(self, config: DhtConfig, who: Identity | None) -> None:
        self.config = config
        self.identity = who
        self.peer_id = who.peer_id if who is not None else "client"
        self.maddrs = (f"/ip4/127.0.0.1/tcp/4201/p2p/{self.peer_id}",)
        self.verifier = Verifier()
        self.refused: Counter[str] = Counter()
        self.time = NOW
        self.accepts = True
        self.is_refused = False
        self.stored: list[tuple[str, bytes, float]] = []
        self.contents: dict[str, dict[str, bytes]] = {}
        self.learned: list[tuple[str, str]] = []

    def now(self) -> float:
        return self.time

    def learn(self, peer_id: str, maddrs: Iterable[str]) -> None:
        self.learned.extend((peer_id, maddr) for maddr in maddrs)

    async def store(self, key: str, value: bytes, expires_at: float) -> bool:
        if self.accepts:
            self.stored.append((key, value, expires_at))
            self.contents.setdefault(key, {})[self.peer_id] = value
        return self.accepts

    async def read(self, keys: Sequence[str]) -> dict[str, dict[str, bytes]]:
        return {key: dict(self.contents.get(key, {})) for key in keys}
