"""A swarm's state as plain data, for `status --json` and the health page's API. No addresses. Pure."""

from __future__ import annotations

from typing import Any

from dht.record import PeerRecord
from dht.view import SwarmView


def summary(view: SwarmView) -> dict[str, Any]:
    """The models with their blocks covered and missing, and their peers."""
    return {
        "as_of": view.as_of,
        "models": [
            {
                "name": model.name,
                "fingerprint": model.fingerprint,
                "n_blocks": model.n_blocks,
                "missing": [str(span) for span in view.missing(model.fingerprint)],
                "replicas": list(view.coverage(model.fingerprint)),
                "peers": [peer_summary(peer, view.as_of) for peer in view.peers(model.fingerprint)],
            }
            for model in view.models
        ],
        "dropped_records": dict(view.dropped),
    }


def peer_summary(peer: PeerRecord, now: float) -> dict[str, Any]:
    """What a peer says of itself, but for how to reach its machine."""
    return {
        "peer_id": peer.peer_id,
        "public_name": peer.public_name,
        "contact": peer.contact,
        "blocks": str(peer.span),
        "state": peer.state,
        "dtype": peer.dtype,
        "unbatched": peer.unbatched,
        "quantization": peer.quantization or "none",
        "step_ms": peer.step_ms,
        "kv_tokens_left": peer.kv_tokens_left,
        "kv_tokens_total": peer.kv_tokens_total,
        "tokens_served": peer.tokens_served,
        "software": peer.software,
        "up_s": max(0.0, now - peer.started_at),
    }
