"""Merging of what many readings of the DHT bring, in any order: built by hypothesis, which the bytes drive.

Nothing is allowed to be raised. The order of readings does not matter but where two records of one signer have the
same sequence; reading twice changes nothing; the newest word of each signer counts, and nobody speaks for another.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from dht.record import ModelRecord, PeerRecord, State
from dht.view import Findings, SwarmView, make_view, merge
from protocol.span import Span
from tests.fuzz.target import Target

NOW = 1_800_000_000.0
SIGNERS = ("QmA", "QmB", "QmC", "QmD")
MODELS = ("f", "g")
STATES: tuple[State, ...] = ("joining", "online", "draining", "offline")


@st.composite
def _peers(draw: st.DrawFn) -> PeerRecord:
    n_blocks = draw(st.sampled_from((1, 4, 5)))
    start = draw(st.integers(0, n_blocks - 1))
    span = Span(start, draw(st.integers(start + 1, n_blocks)))
    return PeerRecord(
        draw(st.sampled_from(SIGNERS)),
        draw(st.sampled_from(MODELS)),
        n_blocks,
        span,
        draw(st.sampled_from(STATES)),
        (),
        b"",
        sequence=draw(st.integers(0, 1 << 20)),
        expires_at=NOW + draw(st.sampled_from((-1.0, 0.5, 60.0))),
    )


@st.composite
def _listings(draw: st.DrawFn) -> ModelRecord:
    n_blocks = draw(st.sampled_from((1, 4, 5)))
    cuts = draw(st.sampled_from(((), (1,), (2, 3)))) if n_blocks > 3 else ()
    return ModelRecord(
        draw(st.sampled_from(SIGNERS)),
        draw(st.sampled_from(("m", "n"))),
        draw(st.sampled_from(MODELS)),
        n_blocks,
        cuts,
        draw(st.sampled_from((1, 2, 64))),
        sequence=draw(st.integers(0, 1 << 20)),
        expires_at=NOW + draw(st.sampled_from((-1.0, 0.5, 60.0))),
    )


def _findings(records: list[PeerRecord | ModelRecord]) -> list[Findings]:
    """One reading for each record."""
    return [
        Findings({record.peer_id: record}) if isinstance(record, PeerRecord) else Findings({}, {record.signer: record})
        for record in records
    ]


def _read(readings: list[Findings]) -> Findings:
    known = Findings()
    for reading in readings:
        known = merge(known, reading, NOW)
    return merge(known, Findings(), NOW)  # what has expired by now is forgotten


@given(st.lists(_peers() | _listings(), max_size=12), st.randoms(use_true_random=False))
def merging(records: list[PeerRecord | ModelRecord], rng: object) -> None:
    records = [replace(record, sequence=record.sequence * 64 + index) for index, record in enumerate(records)]
    in_order = _read(_findings(records))
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    living = [record for record in shuffled if record.expires_at > NOW]
    for known in (_read(_findings([*records, *records])), _read(_findings(living))):
        assert set(known.peers) >= set(in_order.peers) and set(known.models) >= set(in_order.models)
    _check(in_order, make_view(in_order, NOW))
    again = merge(in_order, in_order, NOW)
    assert make_view(again, NOW) == make_view(in_order, NOW)


def _check(known: Findings, view: SwarmView) -> None:
    for signer, peer in known.peers.items():
        assert peer.peer_id == signer and peer.expires_at > NOW
        shown = view.peer(signer)
        assert shown is None or shown == peer
        assert shown is None or peer.state != "offline"
    for model in view.models:
        fingerprint = model.fingerprint
        coverage, missing = view.coverage(fingerprint), view.missing(fingerprint)
        assert len(coverage) == model.n_blocks
        uncovered = {block for span in missing for block in range(span.start, span.stop)}
        assert uncovered == {block for block, count in enumerate(coverage) if not count}
        assert view.is_whole(fingerprint) == (not missing)
        assert all(peer.n_blocks == model.n_blocks for peer in view.peers(fingerprint))
        assert any(listing.name == model.name for listing in known.models.values())


def seeds() -> list[bytes]:
    """Hypothesis reads choices off bytes; more of them are larger swarms."""
    return [bytes(range(256)) * 4, bytes(64), b"\x01\x7f" * 300]


TARGET = Target(
    "view",
    merging.hypothesis.fuzz_one_input,  # type: ignore[attr-defined]
    seeds,
    modules=("dht.view",),
    short=400,
    cpu_s=2.0,
)
