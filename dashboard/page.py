"""What the page says, word by word. Pure; templates only put it into HTML, and escape it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from dashboard import words
from dashboard.advice import Advice, advice, reachability
from dashboard.events import Event, name_of
from dashboard.grid import CELLS, CROSS, PEERS_SHOWN, Grid, grid, shown_peers
from dashboard.health import Health, ModelHealth, PeerHealth, Standing
from protocol.limits import WIRE_VERSION
from protocol.span import Span

EVENTS_SHOWN = 12

Tone = Literal["good", "thin", "bad", "idle"]


@dataclass(frozen=True, slots=True)
class Fact:
    """A number and what it is of."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class PeerLine:
    """A peer in the table. `claims` are its own words only; nobody checks them."""

    name: str
    peer_id: str
    blocks: str
    standing: str
    style: str
    since: str
    facts: tuple[Fact, ...]
    claims: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What the page says of one model. `more`: peers that are not shown."""

    name: str
    fingerprint: str
    tone: Tone
    sentence: str
    since: str
    facts: tuple[Fact, ...]
    grid: Grid
    peers: tuple[PeerLine, ...]
    more: int


@dataclass(frozen=True, slots=True)
class Happened:
    """A line of the log."""

    when: str
    at: str
    glyph: str
    style: str
    text: str


@dataclass(frozen=True, slots=True)
class Page:
    """All that changes on the page."""

    tone: Tone
    sentence: str
    as_of: str
    models: tuple[ModelPart, ...]
    reachability: str
    advice: tuple[Advice, ...]
    events: tuple[Happened, ...]


def page(health: Health, events: Iterable[Event], now: float, *, is_stale: bool = False) -> Page:
    """The page, from the latest health and the latest events (newest first). `is_stale`: that health is an old one."""
    models = tuple(_model(model, now) for model in health.models)
    tones = {model.tone for model in models}
    tone: Tone = next((tone for tone in ("bad", "thin", "good") if tone in tones), "idle")
    return Page(
        tone="bad" if is_stale else tone,
        sentence=_stale(health, now) if is_stale else _overview(health, models),
        as_of=words.clock(health.as_of) if health.as_of else "",
        models=models,
        reachability=reachability(health.peers),
        advice=tuple(advice(health.peers)),
        events=tuple(_happened(event) for event in islice(events, EVENTS_SHOWN)),
    )


def sentence(model: ModelHealth) -> str:
    """How a model is, in one sentence."""
    name = words.without_addresses(model.name)
    if not model.blocks_served:
        return f"{name}: none of its {model.n_blocks} blocks is served"
    if model.missing:
        gaps = ", ".join(map(str, model.missing))
        silent = any(peer.standing is Standing.SILENT and _touches(peer, model.missing) for peer in model.peers)
        who = "no peer that answers" if silent else "no peer"
        return f"{name}: {model.blocks_served} of {model.n_blocks} blocks served, {gaps} by {who}"
    least = words.count(min(model.replicas), "peer")
    whole = len(model.weakest) == model.n_blocks
    how = f"each by {least}" if whole else f"weakest {model.weakest} by {least}"
    free = model.free_tokens_per_s
    return f"{name}: all {model.n_blocks} blocks served, {how}" + (
        "" if free is None else f"; {words.number(free)} tokens/s free"
    )


def _touches(peer: PeerHealth, spans: Sequence[Span]) -> bool:
    return any(peer.record.span.overlap(span) for span in spans)


def _stale(health: Health, now: float) -> str:
    return f"This page has not seen the swarm for {words.duration(now - health.as_of)}."


def _overview(health: Health, models: Sequence[ModelPart]) -> str:
    if not health.as_of:
        return "No swarm answers yet; this page goes on looking for one."
    if not models:
        return "This swarm serves no model yet."
    if len(models) == 1:
        return models[0].sentence
    complete = sum(1 for model in health.models if model.is_complete)
    if complete == len(models):
        return f"All {len(models)} models are served whole"
    return f"{complete} of {len(models)} models are served whole"


def tone(model: ModelHealth) -> Tone:
    """`bad`: blocks are missing; `thin`: one more loss, and some are; else `good`."""
    if model.missing:
        return "bad"
    return "thin" if min(model.replicas) == 1 else "good"


def _model(model: ModelHealth, now: float) -> ModelPart:
    for_s = words.duration(now - model.complete_since)
    return ModelPart(
        name=words.without_addresses(model.name),
        fingerprint=model.fingerprint,
        tone=tone(model),
        sentence=sentence(model),
        since=f"{'whole' if model.is_complete else 'incomplete'} for {for_s}",
        facts=tuple(_facts(model, for_s)),
        grid=grid(model),
        peers=tuple(_line(peer, now) for peer in shown_peers(model.peers)),
        more=max(0, len(model.peers) - PEERS_SHOWN),
    )


def _facts(model: ModelHealth, for_s: str) -> Iterable[Fact]:
    yield Fact("State", "whole" if model.is_complete else "incomplete", f"for {for_s}")
    if model.missing:
        yield Fact("Throughput", "none", "no whole chain")
    elif model.tokens_per_s is not None:
        free = model.free_tokens_per_s or 0.0
        yield Fact("Throughput", f"{words.number(model.tokens_per_s)} tokens/s", f"{words.number(free)} of them free")
    else:
        yield Fact("Throughput", "?", "not measured by all peers")
    if model.token_ms is None:
        yield Fact("Latency", "none", "no whole chain")
    else:
        yield Fact("Latency", words.milliseconds(model.token_ms), "per token, fastest chain")
    share = words.percent(model.kv_tokens_left, model.kv_tokens_total)
    yield Fact("Free cache", words.number(model.kv_tokens_left), f"tokens, {share} of all")
    yield Fact("Peers", str(len(model.peers)), f"{model.answering} answer this page")
    versions = ", ".join(
        f"{words.without_addresses(name.removeprefix('potluck/'))}{f' ({n})' if len(model.software) > 1 else ''}"
        for name, n in islice(model.software.items(), 4)
    )
    strange = sum(1 for peer in model.peers if not peer.is_compatible)
    note = f"{words.count(strange, 'peer')} cannot be used" if strange else f"wire version {WIRE_VERSION}"
    yield Fact("Software", versions or "?", note)


def _line(peer: PeerHealth, now: float) -> PeerLine:
    record = peer.record
    state = CELLS[peer.standing]
    weights = record.dtype if not record.quantization or record.quantization == "none" else record.quantization
    served = "does not say" if record.tokens_served is None else f"{words.number(record.tokens_served)} tokens"
    said = [
        Fact("served", served),
        Fact("up", words.duration(now - record.started_at) if record.started_at else "does not say"),
    ]
    if record.contact:
        said.append(Fact("contact", words.without_addresses(record.contact)))
    rtt = words.milliseconds(peer.reach.rtt_ms) if peer.reach.answers else "?"
    facts = [
        Fact("round trip", rtt),
        Fact("per token", words.milliseconds(record.step_ms)),
        Fact("free cache", words.percent(record.kv_tokens_left, record.kv_tokens_total)),
        Fact("weights", words.without_addresses(weights) or "?"),
        Fact("software", words.without_addresses(record.software.removeprefix("potluck/")) or "?"),
    ]
    standing = str(peer.standing) if peer.is_compatible else "speaks another version"
    if record.moving_to is not None:
        standing += f", moves to {record.moving_to}"
    return PeerLine(
        name=name_of(peer),
        peer_id=record.peer_id,
        blocks=str(record.span),
        standing=standing,
        style=state.style,
        since=words.duration(now - peer.standing_since),
        facts=tuple(facts),
        claims=tuple(said),
    )


_GLYPHS = {
    "gap": (CROSS, "bad"),
    "silent": (CROSS, "bad"),
    "left": ("-", "idle"),
    "draining": ("▽", "idle"),
    "moved": ("→", "idle"),
    "joined": ("+", "good"),
    "back": ("+", "good"),
    "whole": ("■", "good"),
}


def _happened(event: Event) -> Happened:
    glyph, style = _GLYPHS[event.kind]
    text = f"{words.without_addresses(event.model)}: {event.text}"
    return Happened(words.clock(event.at), words.iso(event.at), glyph, style, text)


_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def join_command(health: Health, join: str | None) -> str:
    """What a newcomer types to share a machine. Names that strangers chose enter it only if a shell takes them as text.

    Args:
        join: the address of a node, if one may be shown.
    """
    command = ["python", "-m", "peer", "serve"]
    names = [model.name for model in sorted(health.models, key=lambda model: -len(model.peers))]
    if len(names) > 1:
        command += ["--model", names[0] if _PLAIN_NAME.fullmatch(names[0]) else "NAME"]
    if join is not None:
        command += ["--join", join]
    return shlex.join(command)
