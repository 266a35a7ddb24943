"""When a peer announces itself, and that it never fails for it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from dht import announcer as module
from dht.announcer import Announced, announcing, has_changed, is_due
from dht.config import DhtConfig
from dht.record import MODELS_KEY, ModelRecord, PeerRecord
from protocol.errors import BadRecord, ConfigError
from tests.dht.support import MODEL, NOW, FakeNode, identity, listing, peer

CONFIG = DhtConfig()
LAST = Announced(peer(0), at_s=100.0)


def test_the_steady_pace() -> None:
    assert is_due(None, peer(0), 0.0, CONFIG)
    assert not is_due(LAST, peer(0), 119.9, CONFIG)
    assert is_due(LAST, peer(0), 120.0, CONFIG)


def test_a_change_of_state_does_not_wait() -> None:
    assert is_due(LAST, peer(0, state="draining"), 100.0, CONFIG)


def test_other_news_waits_for_the_gap() -> None:
    for news in (peer(0, "0:12"), peer(0, kv_tokens_left=0), peer(0, step_ms=9.0), peer(0, step_ms=None)):
        assert not is_due(LAST, news, 104.9, CONFIG)
        assert is_due(LAST, news, 105.0, CONFIG)


def test_only_a_clear_step_of_load_is_news() -> None:
    before = peer(0, kv_tokens_left=2000, kv_tokens_total=4000, step_ms=10.0, tokens_per_s=100.0)
    for same in (
        replace(before, kv_tokens_left=2999),
        replace(before, step_ms=12.0),
        replace(before, tokens_per_s=80.0),
    ):
        assert not has_changed(before, same, 0.25)
    for news in (
        replace(before, kv_tokens_left=3000),
        replace(before, step_ms=14.0),
        replace(before, tokens_per_s=70.0),
    ):
        assert has_changed(before, news, 0.25)


def test_what_the_announcer_fills_in_is_no_news() -> None:
    assert not has_changed(peer(0), peer(0, sequence=9, expires_at=NOW + 9, maddrs=("x",)), 0.25)


def records(node: FakeNode) -> list[PeerRecord]:
    return [PeerRecord.decode(raw, now=node.time) for key, raw, _ in node.stored if key != MODELS_KEY]


async def test_a_peer_comes_lists_its_model_and_leaves() -> None:
    node = FakeNode(CONFIG, identity(0))
    async with announcing(node, lambda: peer(0), replace(listing(0), signer="")):  # type: ignore[arg-type]
        assert [record.state for record in records(node)] == ["online"]
        [model] = [ModelRecord.decode(raw, now=NOW) for key, raw, _ in node.stored if key == MODELS_KEY]
        assert (model.name, model.signer) == ("test/model", identity(0).peer_id)
        assert records(node)[0].maddrs == node.maddrs
        assert records(node)[0].expires_at == NOW + CONFIG.expiry_s
    assert [record.state for record in records(node)] == ["online", "offline"]


async def test_a_tombstone_is_left_however_it_ends() -> None:
    node = FakeNode(CONFIG, identity(0))
    with pytest.raises(RuntimeError, match="boom"):
        async with announcing(node, lambda: peer(0)):  # type: ignore[arg-type]
            raise RuntimeError("boom")
    assert records(node)[-1].state == "offline"

    async def serve() -> None:
        async with announcing(node, lambda: peer(0)):  # type: ignore[arg-type]
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    async with asyncio.timeout(5):
        while records(node)[-1].state == "offline":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert records(node)[-1].state == "offline"


async def test_a_changed_state_is_told_at_once() -> None:
    node = FakeNode(CONFIG, identity(0))
    state = "joining"
    async with announcing(node, lambda: peer(0, state=state)) as announcer:  # type: ignore[arg-type]
        state = "online"
        announcer.changed()
        async with asyncio.timeout(module.LOOK_EVERY_S / 2):
            while records(node)[-1].state != "online":
                await asyncio.sleep(0)


async def test_failures_are_retried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER_S", 0.001)
    node = FakeNode(CONFIG, identity(0))
    node.accepts = False
    async with announcing(node, lambda: peer(0)):  # type: ignore[arg-type]
        assert "no node of the swarm took" in caplog.text
        node.accepts = True
        async with asyncio.timeout(5):
            while not node.stored:
                await asyncio.sleep(0)


async def test_a_record_that_turns_bad_is_logged_and_not_raised(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_AFTER_S", 0.001)
    node = FakeNode(CONFIG, identity(0))
    current = peer(0)
    async with announcing(node, lambda: current) as announcer:  # type: ignore[arg-type]
        current = peer(0, state="draining", addresses=("nonsense",))
        announcer.changed()
        async with asyncio.timeout(5):
            while "not fit to be announced" not in caplog.text:
                await asyncio.sleep(0)
        current = peer(0, state="draining")
        async with asyncio.timeout(5):
            while records(node)[-1].state != "draining":
                await asyncio.sleep(0)


async def test_sequence_and_expiry_grow_even_if_the_clock_is_set_back() -> None:
    node = FakeNode(CONFIG, identity(0))
    async with announcing(node, lambda: peer(0)) as announcer:  # type: ignore[arg-type]
        node.time -= 20
        assert await announcer.announce()
        first, second = records(node)
    assert second.sequence > first.sequence and second.expires_at > first.expires_at


async def test_a_bad_first_record_is_the_callers_error() -> None:
    with pytest.raises(BadRecord):
        async with announcing(FakeNode(CONFIG, identity(0)), lambda: peer(0, "0:99")):  # type: ignore[arg-type]
            pytest.fail("announced")


async def test_a_client_cannot_announce() -> None:
    with pytest.raises(ConfigError):
        async with announcing(FakeNode(CONFIG, None), lambda: peer(0)):  # type: ignore[arg-type]
            pytest.fail("announced")


def test_models_are_those_of_the_records() -> None:
    assert listing(0).fingerprint == peer(0).fingerprint == MODEL
