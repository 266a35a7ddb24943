"""The history: thinning loses no outage and no weight, and what is written is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.events import Event
from dashboard.history import COLUMNS, DAY_S, TIERS, Sample, columns, merged, open_history, sample, thinned
from protocol.errors import ConfigError
from tests.dashboard.support import MODEL, NOW, health, peer

numbers = st.none() | st.floats(0, 1e6)
ages = st.floats(0, 40 * DAY_S)


def samples() -> st.SearchStrategy[list[Sample]]:
    one = st.builds(
        Sample, at=ages.map(lambda age: NOW - age), weight=st.integers(1, 9), n_blocks=st.just(24),
        blocks_served=st.integers(0, 24), weakest=st.integers(0, 5), peers=st.floats(0, 99), answering=st.floats(0, 99),
        tokens_per_s=numbers, free_tokens_per_s=numbers, token_ms=numbers,
    )  # fmt: skip
    return st.lists(one, max_size=60)


@given(samples())
def test_thinning_twice_is_thinning_once(found: list[Sample]) -> None:
    once = thinned(found, NOW)
    assert thinned(once, NOW) == once


@given(samples())
def test_thinning_keeps_weights_and_the_worst_coverage(found: list[Sample]) -> None:
    kept, young = thinned(found, NOW), [one for one in found if NOW - one.at <= 30 * DAY_S]
    assert sum(one.weight for one in kept) == sum(one.weight for one in young)
    assert min((one.blocks_served for one in kept), default=0) == min((one.blocks_served for one in young), default=0)
    assert all(NOW - one.at <= 30 * DAY_S for one in kept)
    assert [one.at for one in kept] == sorted(one.at for one in kept)


@given(samples())
def test_thinning_leaves_one_for_each_stretch(found: list[Sample]) -> None:
    stretches = []
    for one in thinned(found, NOW):
        tier = next(index for index, (age_s, _) in enumerate(TIERS) if NOW - one.at <= age_s)
        stretches.append((tier, one.at // TIERS[tier][1]))
    assert len(stretches) == len(set(stretches))


def test_a_month_is_a_few_thousand_samples() -> None:
    one = sample(health(peer("a", "0:24")).models[0], NOW)
    every_minute = [replace(one, at=NOW - minute * 60) for minute in range(31 * 24 * 60)]
    kept = thinned(every_minute, NOW)
    assert 3_000 < len(kept) < 4_000


def test_merging_takes_means_of_what_is_known() -> None:
    one = sample(health(peer("a", "0:24")).models[0], NOW)
    other = replace(one, at=NOW + 30, weight=3, peers=5.0, tokens_per_s=None, blocks_served=7)
    both = merged([one, other])
    assert (both.at, both.weight, both.peers, both.tokens_per_s, both.blocks_served) == (NOW, 4, 4.0, 80.0, 7)


def test_a_gap_is_no_line() -> None:
    one = sample(health(peer("a", "0:24")).models[0], NOW)
    found = columns([one, replace(one, at=NOW + 30), replace(one, at=NOW + 3000)], gap_s=90.0)
    assert found["peers"] == [1.0, 1.0, None, 1.0]
    assert found["at"] == [NOW, NOW + 30, NOW + 75, NOW + 3000]
    assert set(columns([], 90.0)) == set(COLUMNS)


async def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = sample(health(peer("a", "0:24", tokens_per_s=None)).models[0], NOW)
    event = Event(NOW, "joined", "tiny", "a came")
    async with open_history(tmp_path / "new" / "history.sqlite3", 30) as history:
        await history.add({MODEL: one}, [event, replace(event, text="b came")], {"Qma": ("serving", NOW - 9)}, NOW)
    async with open_history(tmp_path / "new" / "history.sqlite3", 30) as history:
        assert await history.samples(MODEL, NOW - 1) == [one]
        assert await history.samples(MODEL, NOW + 1) == []
        assert [event.text for event in await history.events(10)] == ["a came", "b came"]
        assert await history.since(NOW + 60) == {"Qma": ("serving", NOW - 9)}
        assert await history.since(NOW + 3600) == {}, "it was away for too long"


async def test_the_file_is_thinned(tmp_path: Path) -> None:
    one = sample(health(peer("a", "0:24")).models[0], NOW)
    async with open_history(tmp_path / "history.sqlite3", 30) as history:
        for age_s in (0, 30, 2 * DAY_S - 30, 2 * DAY_S, 31 * DAY_S):
            events = [Event(NOW - age_s, "joined", "tiny", "a came")]
            await history.add({MODEL: replace(one, at=NOW - age_s)}, events, {}, NOW)
        await history.thin(NOW, events_kept=2)
        assert [s.weight for s in await history.samples(MODEL, 0)] == [2, 1, 1]
        assert len(await history.events(10)) == 2


async def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a database" * 100)
    with pytest.raises(ConfigError, match="--history"):
        async with open_history(tmp_path / "notes", 30):
            pass
