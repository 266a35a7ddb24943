"""The health page for programs: plain data under /api/v1/, without addresses. What only a peer says is in `claims`."""

from __future__ import annotations

from typing import Any

from dashboard.health import Health, ModelHealth, PeerHealth
from dashboard.page import sentence
from dashboard.words import without_addresses
from dht.summary import peer_summary

CLAIMS = ("public_name", "contact", "tokens_served", "up_s")

INDEX = {
    "/api/v1/swarm": "The swarm: its models, their blocks and peers.",
    "/api/v1/history": "How a model was: ?model=FINGERPRINT&hours=24, up to 720.",
    "/api/v1/events": "What happened lately, newest first.",
    "/api/v1/live": "The page's changing part as server-sent events.",
    "/metrics": "For Prometheus.",
    "/health": "For load balancers: 200 as long as this page sees the swarm.",
}


def swarm(health: Health, now: float) -> dict[str, Any]:
    """All that the page knows."""
    return {
        "as_of": health.as_of,
        "complete": health.is_complete,
        "models": [_model(model, now) for model in health.models],
        "dropped_records": dict(health.dropped),
    }


def _model(model: ModelHealth, now: float) -> dict[str, Any]:
    return {
        "name": without_addresses(model.name),
        "fingerprint": model.fingerprint,
        "sentence": sentence(model),
        "n_blocks": model.n_blocks,
        "complete": model.is_complete,
        "complete_since": model.complete_since,
        "missing": [str(span) for span in model.missing],
        "replicas": list(model.replicas),
        "weakest": {"blocks": str(model.weakest), "peers": min(model.replicas)},
        "tokens_per_s": model.tokens_per_s,
        "free_tokens_per_s": model.free_tokens_per_s,
        "token_ms": model.token_ms,
        "kv_tokens_left": model.kv_tokens_left,
        "kv_tokens_total": model.kv_tokens_total,
        "software": {without_addresses(name): peers for name, peers in model.software.items()},
        "peers": [_peer(peer, now) for peer in model.peers],
    }


def _peer(peer: PeerHealth, now: float) -> dict[str, Any]:
    said = {name: _shown(value) for name, value in peer_summary(peer.record, now).items()}
    claims = {name: said.pop(name) for name in CLAIMS}
    return {
        **said,
        "standing": peer.standing.name.lower(),
        "standing_since": peer.standing_since,
        "answers": peer.reach.answers,
        "rtt_ms": peer.reach.rtt_ms,
        "tokens_per_s": peer.record.tokens_per_s,
        "queue_ms": peer.record.queue_ms,
        "wire_version": peer.record.wire_version,
        "compatible": peer.is_compatible,
        "claims": claims,
    }


def _shown(value: object) -> object:
    return without_addresses(value) if isinstance(value, str) else value
