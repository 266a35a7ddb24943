"""Merging and snapshots (pure), and a reader over a pretended network."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.config import DhtConfig
from dht.record import MODELS_KEY, ModelRecord, PeerRecord, peer_key
from dht.validator import Verifier
from dht.view import Findings, SwarmReader, SwarmView, make_view, merge, reading, sift
from protocol.errors import SwarmNotFound
from protocol.span import Span
from tests.dht.support import MODEL, N_BLOCKS, NOW, OTHER_MODEL, FakeNode, identity, listing, peer

CONFIG = DhtConfig(refresh_every_s=0.01)


def view_of(*records: PeerRecord | ModelRecord, now: float = NOW) -> SwarmView:
    """All records read at once."""
    findings = Findings()
    for record in records:
        findings = merge(findings, as_findings(record), now)
    return make_view(findings, now)


def as_findings(record: PeerRecord | ModelRecord) -> Findings:
    if isinstance(record, PeerRecord):
        return Findings(peers={record.peer_id: record})
    return Findings(models={record.signer: record})


def test_a_swarm_of_three() -> None:
    view = view_of(peer(0, "0:10"), peer(1, "8:16"), peer(2, "20:24", "joining"), listing(0), listing(1), listing(2))
    assert [model.name for model in view.models] == ["test/model"]
    assert [str(record.span) for record in view.peers(MODEL)] == ["0:10", "8:16", "20:24"]
    assert view.missing(MODEL) == (Span(16, 24),)
    assert view.coverage(MODEL) == (1,) * 8 + (2,) * 2 + (1,) * 6 + (0,) * 8
    assert view.peer(identity(1).peer_id) == peer(1, "8:16")
    assert view.named("test/model") == view.models


@pytest.mark.parametrize("state", ["joining", "draining"])
def test_peers_that_take_no_sessions_are_shown_but_cover_nothing(state: str) -> None:
    view = view_of(peer(0, state=state), listing(0))  # type: ignore[arg-type]
    assert len(view.peers(MODEL)) == 1
    assert view.missing(MODEL) == (Span(0, N_BLOCKS),)


def test_an_empty_swarm() -> None:
    view = SwarmView()
    assert view.models == () and view.peers(MODEL) == () and view.missing(MODEL) == () and view.coverage(MODEL) == ()
    assert view.peer("Qm") is None and view.model(MODEL) is None


def test_a_tombstone_hides_the_peer_in_whatever_order_it_is_read() -> None:
    alive, gone = peer(0), peer(0, state="offline", sequence=2)
    for records in ((alive, gone), (gone, alive)):
        view = view_of(listing(0), *records)
        assert view.peers(MODEL) == () and view.models == ()


def test_a_peer_that_comes_back_after_its_tombstone_is_shown() -> None:
    view = view_of(peer(0, state="offline", sequence=2), peer(0, sequence=3))
    assert len(view.peers(MODEL)) == 1


def test_a_peer_is_forgotten_when_its_record_expires() -> None:
    known = merge(Findings(), as_findings(peer(0)), NOW)
    assert merge(known, Findings(), NOW + 59).peers
    assert not merge(known, Findings(), NOW + 60).peers


@given(st.permutations([(0, 1), (0, 2), (0, 3), (1, 5), (1, 4), (2, 1)]), st.integers(1, 6))
def test_the_order_and_grouping_of_reads_do_not_matter(order: list[tuple[int, int]], cut: int) -> None:
    records = [peer(index, sequence=sequence) for index, sequence in order]
    one_by_one = view_of(*records)
    halves = [Findings(peers={}) for _ in range(2)]
    for half, part in enumerate((records[:cut], records[cut:])):
        for record in part:
            halves[half] = merge(halves[half], as_findings(record), NOW)
    assert make_view(merge(halves[0], halves[1], NOW), NOW).peers_by_model == one_by_one.peers_by_model
    assert {p.sequence for p in one_by_one.peers(MODEL)} == {3, 5, 1}


def test_a_listing_counts_only_while_its_signer_serves_the_model() -> None:
    assert view_of(listing(0)).models == ()
    assert view_of(listing(0), peer(0, fingerprint=OTHER_MODEL)).models == ()
    assert view_of(listing(0), peer(1)).models == ()
    assert view_of(listing(0, n_blocks=12, cuts=()), peer(0)).models == ()
    assert len(view_of(listing(0), peer(0)).models) == 1


def test_of_differing_listings_the_one_of_most_peers_counts() -> None:
    records = [peer(index) for index in range(3)]
    lists = [listing(0, name="lie"), listing(1), listing(2)]
    random.shuffle(lists)
    view = view_of(*records, *lists)
    assert [model.name for model in view.models] == ["test/model"]
    tied = view_of(*records[:2], *sorted(lists, key=lambda model: model.name)[:2])
    assert [model.name for model in tied.models] == ["lie"]


def test_a_peer_with_another_number_of_blocks_is_dropped_and_counted() -> None:
    view = view_of(peer(0), peer(1), peer(2, "0:12", n_blocks=12), listing(0), listing(1), listing(2))
    assert len(view.peers(MODEL)) == 2
    assert sum(view.dropped.values()) == 1


def test_views_are_frozen() -> None:
    view = view_of(peer(0), listing(0))
    with pytest.raises(TypeError):
        view.peers_by_model[MODEL] = ()  # type: ignore[index]
    with pytest.raises(AttributeError):
        view.as_of = 0.0  # type: ignore[misc]


def test_bad_records_are_dropped_and_counted_by_reason() -> None:
    key, good = peer_key(MODEL, 0), peer(0).encode(identity(0))
    expired = peer(1, expires_at=NOW - 1).encode(identity(1))
    elsewhere = peer(2, fingerprint=OTHER_MODEL).encode(identity(2))
    found = {
        key: {
            identity(0).peer_id: good,
            identity(1).peer_id: expired,
            identity(2).peer_id: elsewhere,
            identity(3).peer_id: good,
            "Qm4": b"garbage",
            "Qm5": good[:-1] + bytes([good[-1] ^ 1]),
            "Qm6": b"\x00" * 10_000,
            "Qm7": listing(0).encode(identity(0)),
        },
        MODELS_KEY: {identity(0).peer_id: good},
    }
    findings = sift(found, Verifier(), NOW)
    assert list(findings.peers) == [identity(0).peer_id] and not findings.models
    assert sum(findings.dropped.values()) == 8
    assert {"the record is expired", "the signature is wrong", "the subkey is not the signer"} <= set(findings.dropped)


def test_signatures_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from dht import validator

    checked: list[object] = []
    real = validator.unseal

    def counting(raw: object) -> object:
        checked.append(raw)
        return real(raw)

    monkeypatch.setattr(validator, "unseal", counting)
    verifier = Verifier(capacity=2)
    found = {peer_key(MODEL, 0): {identity(0).peer_id: peer(0).encode(identity(0)), "Qm": b"garbage"}}
    for _ in range(3):
        assert sum(sift(found, verifier, NOW).dropped.values()) == 1
    assert len(checked) == 2


# ---------------------------------------------------------------------------- the reader


def put(node: FakeNode, index: int, record: PeerRecord | ModelRecord) -> None:
    key = record.key(1) if isinstance(record, PeerRecord) else MODELS_KEY
    node.contents.setdefault(key, {})[identity(index).peer_id] = record.encode(identity(index))


async def test_a_reader_finds_models_and_their_peers() -> None:
    node = FakeNode(CONFIG, None)
    address = "/ip4/127.0.0.1/tcp/4/p2p/" + identity(0).peer_id
    put(node, 0, peer(0, "0:12", maddrs=(address,)))
    put(node, 1, peer(1, "12:24", fingerprint=OTHER_MODEL))
    put(node, 0, listing(0))
    put(node, 1, listing(1, fingerprint=OTHER_MODEL, name="other"))
    node.refused["the signature is wrong"] += 3
    reader = SwarmReader(node)  # type: ignore[arg-type]
    view = await reader.refresh()
    assert [model.name for model in view.models] == ["other", "test/model"]
    assert view.dropped == {"the signature is wrong": 3} and not node.refused
    assert node.learned == [(identity(0).peer_id, address)]
    assert (await reader.refresh()).dropped == {}


async def test_a_reader_reads_all_shards() -> None:
    node = FakeNode(CONFIG, None)
    records = [peer(index, f"{index * 4}:{index * 4 + 4}") for index in range(4)]
    for index, record in enumerate(records):
        node.contents.setdefault(record.key(64), {})[record.peer_id] = record.encode(identity(index), shards=64)
        put(node, index, listing(index, shards=64))
    assert len((await SwarmReader(node).refresh()).peers(MODEL)) == 4  # type: ignore[arg-type]


async def test_a_watched_model_is_read_without_a_listing() -> None:
    node = FakeNode(CONFIG, None)
    put(node, 0, peer(0))
    assert (await SwarmReader(node).refresh()).peers(MODEL) == ()  # type: ignore[arg-type]
    assert len((await SwarmReader(node, [MODEL]).refresh()).peers(MODEL)) == 1  # type: ignore[arg-type]


async def test_waiting_for_a_peer() -> None:
    node = FakeNode(CONFIG, None)
    async with reading(node, [MODEL]) as reader:  # type: ignore[arg-type]
        with pytest.raises(TimeoutError):
            await reader.wait_until(lambda view: bool(view.peers(MODEL)), 0.02)
        put(node, 0, peer(0))
        assert (await reader.wait_until(lambda view: bool(view.peers(MODEL)), 5)).peers(MODEL)
        put(node, 0, replace(peer(0), state="offline", sequence=2))
        await reader.wait_until(lambda view: not view.peers(MODEL), 5)


async def test_a_read_that_fails_keeps_what_has_not_expired(caplog: pytest.LogCaptureFixture) -> None:
    node = FakeNode(CONFIG, None)
    put(node, 0, peer(0))
    failed = asyncio.Event()

    async def fail(keys: object) -> dict[str, dict[str, bytes]]:
        if failed.is_set():
            node.time = NOW + 61
        failed.set()
        raise SwarmNotFound("gone")

    async with reading(node, [MODEL]) as reader:  # type: ignore[arg-type]
        node.read = fail  # type: ignore[method-assign,assignment]
        await failed.wait()
        assert reader.view.peers(MODEL)
        async with asyncio.timeout(5):
            while reader.view.peers(MODEL):
                await asyncio.sleep(0)
    assert "gone" in caplog.text


async def test_an_expired_peer_is_not_shown_until_the_next_regular_read() -> None:
    node = FakeNode(DhtConfig(refresh_every_s=3600.0), None)
    put(node, 0, peer(0, expires_at=NOW + 0.05))
    async with reading(node, [MODEL]) as reader:  # type: ignore[arg-type]
        assert reader.view.peers(MODEL)
        node.time = NOW + 0.05
        await reader.wait_until(lambda view: not view.peers(MODEL), 5)


async def test_the_first_read_must_succeed() -> None:
    node = FakeNode(CONFIG, None)

    async def fail(keys: object) -> dict[str, dict[str, bytes]]:
        raise SwarmNotFound("gone")

    node.read = fail  # type: ignore[method-assign,assignment]
    with pytest.raises(SwarmNotFound):
        async with reading(node):  # type: ignore[arg-type]
            pytest.fail("opened")
