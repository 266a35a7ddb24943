"""What happened in a swarm: the difference of two looks at it, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dashboard.health import Health, ModelHealth, PeerHealth, Standing, completeness
from dashboard.words import without_addresses


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log.

    Attributes:
        at: seconds since 1970.
        kind: `gap`, `whole`, `joined`, `left`, `silent`, `back`, `draining`, `moved`.
        model: its name.
        text: plain text; it may hold a name that a stranger chose.
    """

    at: float
    kind: str
    model: str
    text: str


def name_of(peer: PeerHealth) -> str:
    """What a peer calls itself, else the end of its id."""
    return without_addresses(peer.record.public_name) or f"…{peer.record.peer_id[-8:]}"


def changes(before: Health, after: Health) -> list[Event]:
    """What happened between two looks, what matters most first; nothing, if the swarm was not seen before."""
    if not before.as_of:
        return []
    events: list[Event] = []
    known = {model.fingerprint: model for model in before.models}
    for model in after.models:
        was = known.pop(model.fingerprint, None)
        events += _of_model(was, model, after.as_of)
    events += [Event(after.as_of, "gap", model.name, "no peer serves it any more") for model in known.values()]
    return events


def _of_model(before: ModelHealth | None, after: ModelHealth, at: float) -> list[Event]:
    said: list[tuple[str, str]] = []
    if before is None or before.missing != after.missing:
        if after.missing:
            gaps = ", ".join(map(str, after.missing))
            said.append(("gap", f"blocks {gaps} have no peer"))
        elif before is not None:
            said.append(("whole", f"all {after.n_blocks} blocks are served again"))
        else:
            said.append(("whole", f"all {after.n_blocks} blocks are served"))
    said += _of_peers({} if before is None else _by_id(before), _by_id(after))
    return [Event(at, kind, after.name, text) for kind, text in said]


def _by_id(model: ModelHealth) -> dict[str, PeerHealth]:
    return {peer.record.peer_id: peer for peer in model.peers}


def _of_peers(before: dict[str, PeerHealth], after: dict[str, PeerHealth]) -> Iterator[tuple[str, str]]:
    for peer_id, peer in after.items():
        was, name, blocks = before.get(peer_id), name_of(peer), peer.record.span
        if was is None:
            yield "joined", f"{name} came, with blocks {blocks}"
        elif was.record.span != blocks:
            yield "moved", f"{name} moved from blocks {was.record.span} to {blocks}"
        elif was.standing is not peer.standing:
            yield from _of_standing(was.standing, peer.standing, f"{name} (blocks {blocks})")
    for peer_id, was in before.items():
        if peer_id not in after:
            name, blocks = name_of(was), was.record.span
            if was.standing is Standing.SILENT:
                yield "left", f"{name} (blocks {blocks}) is gone: it said nothing more"
            else:
                yield "left", f"{name} (blocks {blocks}) left"


def _of_standing(before: Standing, after: Standing, who: str) -> Iterator[tuple[str, str]]:
    if after is Standing.SILENT:
        yield "silent", f"{who} does not answer"
    elif before is Standing.SILENT and after is Standing.SERVING:
        yield "back", f"{who} answers again"
    elif after is Standing.DRAINING:
        yield "draining", f"{who} takes no new sessions"
    elif before is Standing.JOINING and after in (Standing.SERVING, Standing.UNASKED):
        yield "joined", f"{who} serves"


def since_of(health: Health) -> dict[str, tuple[str, float]]:
    """What peers and models are, and since when: for the next look."""
    known: dict[str, tuple[str, float]] = {
        model.fingerprint: (completeness(model.is_complete), model.complete_since) for model in health.models
    }
    return known | {peer.record.peer_id: (peer.standing, peer.standing_since) for peer in health.peers}
