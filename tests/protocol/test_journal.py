"""Whatever was appended, a replay of the journal leaves a cache as the original steps left it."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SessionLost
from protocol.journal import Entry, Journal, StepLog
from protocol.limits import IN_FLIGHT
from protocol.messages import ATTENTION_MASK, CacheOp
from tests.protocol.entries import FakeCache, hidden, part, steps


@given(steps(), st.integers(1, 40))
def test_a_replay_makes_the_same_cache(entries: list[Entry], max_tokens: int) -> None:
    original, journal = FakeCache(), Journal()
    for entry in entries:
        original.apply(entry)
        journal.append(entry)
    replayed, position = FakeCache(), 0
    for entry in journal.batches(max_tokens):
        assert entry.position == position, "a replay has no gaps"
        replayed.apply(entry)
        position += entry.tokens
    assert replayed.rows == original.rows
    assert journal.nbytes == sum(e.nbytes for e in journal.entries)


def test_neighbours_are_joined_up_to_the_limit() -> None:
    journal = Journal()
    for position in range(10):
        journal.append(single(position))
    assert [e.tokens for e in journal.batches(4)] == [4, 4, 2]


def test_a_cropped_mask_covers_the_past_too() -> None:
    journal = Journal()
    mask = part([[0, 1, 1, 1, 1, 1]], ATTENTION_MASK)
    journal.append(Entry(0, 2, 1, (part([[1, 2]]), part([[0, 1]], ATTENTION_MASK))))
    journal.append(Entry(2, 4, 1, (part([[3, 4, 5, 6]]), mask)))
    journal.append(Entry(3, 1, 1, (part([[7]]), part([[0, 1, 1, 1]], ATTENTION_MASK)), (CacheOp("crop", (3,)),)))
    kept = journal.entries[1]
    assert [p.spec.keep for p in kept.parts] == [1, 3]
    assert [e.tokens for e in journal.batches(100)] == [4], "one replay, with the last mask only"
    joined = next(journal.batches(100))
    assert [p.spec.name for p in joined.parts].count(ATTENTION_MASK) == 1


def masked(position: int, mask: list[list[int]], tokens: int = 1, **changed: object) -> Entry:
    """A step of so many tokens, under this mask of rows, changed so."""
    columns = part(mask, ATTENTION_MASK)
    columns = replace(columns, spec=replace(columns.spec, **changed))  # type: ignore[arg-type]
    return Entry(position, tokens, len(mask), (part([[position] * tokens] * len(mask)), columns))


def test_padded_prompts_and_what_follows_them_are_joined() -> None:
    journal, mask = Journal(), [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    journal.append(masked(0, mask, tokens=4))
    for position in range(4, 40):
        mask = [[*row, 1] for row in mask]
        journal.append(masked(position, mask))
    (replay,) = journal.batches(1000)
    assert replay.tokens == 40
    assert [bytes(p.payload) for p in replay.parts if p.spec.name == ATTENTION_MASK] == [
        bytes(v for row in mask for v in row)
    ]


@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.lists(
            st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), min_size=rows, max_size=rows), max_size=8
        )
    ),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_a_step_is_never_replayed_under_another_mask(masks: list[list[list[int]]], like_before: list[bool]) -> None:
    """Each token of a replay sees of the past what its own step let it see."""
    journal, before = Journal(), list[list[int]]()
    sent: list[list[list[int]]] = []
    for position, mask in enumerate(masks):
        mask = [row[: position + 1] for row in mask]
        if before and like_before[position]:
            mask = [[*old, row[-1]] for old, row in zip(before, mask, strict=True)]
        sent.append(before := mask)
        journal.append(masked(position, mask))
    replays = list(journal.batches(100))
    for replay in replays:
        (whole,) = (p for p in replay.parts if p.spec.name == ATTENTION_MASK)
        width = whole.spec.shape[1]
        rows = [list(whole.payload[i * width : (i + 1) * width]) for i in range(replay.rows)]
        for position in range(replay.position, replay.position + replay.tokens):
            assert [row[: position + 1] for row in rows] == sent[position]
    changes = sum([row[:-1] for row in now] != was for was, now in pairwise(sent))
    assert len(replays) == (changes + 1 if sent else 0), "and what can be joined is"


def test_masks_that_change_backwards_are_not_joined() -> None:
    journal = Journal()
    for position in range(5, 11):
        journal.append(masked(position, [[position % 2 == 0] * 5 + [1] * (position - 4)]))
    assert [replay.tokens for replay in journal.batches(100)] == [1] * 6


@pytest.mark.parametrize(
    "later",
    [
        masked(3, [[1, 1, 1, 1]], dtype="int8"),
        masked(3, [[1, 1, 1, 1]], codec="int8"),
        masked(3, [[1, 1, 1, 1]], keep=2),
        masked(3, [[1, 1, 1, 1]], shape=(4,)),
        masked(3, [[1, 1, 1, 1]], shape=(1, 3)),
        masked(3, [[1, 1, 1, 1]], shape=(0, 4)),
        masked(3, [[1, 1]]),
        replace(masked(3, [[1, 1, 1, 1]]), parts=(*masked(3, [[1, 1, 1, 1]]).parts, part([[1] * 4], ATTENTION_MASK))),
    ],
    ids=["number format", "codec", "crop", "shape", "bytes", "no rows", "shorter", "two"],
)
def test_masks_that_cannot_be_compared_are_not_joined(later: Entry) -> None:
    journal = Journal([masked(2, [[1, 1, 1]]), later])
    assert [replay.tokens for replay in journal.batches(100)] == [1, 1]


# ---------------------------------------------------------------------- a log of all steps, for whoever lacks some


def single(step_id: int, *ops: CacheOp) -> Entry:
    """A decode step: one token, whose value is its step's id."""
    return Entry(step_id, 1, 1, (part([[step_id]]),), ops, step_id)


class Consumer:
    """The hop after a log: takes each step once, and knows which one it expects."""

    def __init__(self) -> None:
        self.cache = FakeCache()
        self.next_step = 0

    def take(self, entries: list[Entry]) -> None:
        for entry in entries:
            assert entry.step_id >= self.next_step, "no step comes twice"
            self.cache.apply(entry)
            self.next_step = entry.step_id + 1


def log_of(entries: list[Entry], *, keeps_all: bool = True) -> StepLog:
    log = StepLog(keeps_all)
    for entry in entries:
        log.put(entry)
    return log


@given(steps(max_steps=3 * IN_FLIGHT), st.integers(1, 40), st.data())
def test_consumers_that_lag_or_come_late_end_as_one_that_was_there(
    entries: list[Entry], max_tokens: int, data: st.DataObject
) -> None:
    comes_at = data.draw(st.integers(0, len(entries) - 1), label="the step at which it comes")
    log, always, lagging, late = StepLog(keeps_all=True), Consumer(), Consumer(), Consumer()
    for entry in entries:
        log.put(entry)
        lacking = log.since(always.next_step, max_tokens)
        assert lacking == [entry], "whoever has all but the latest gets exactly that one"
        always.take(lacking)
        lacks = entry.step_id + 1 - lagging.next_step
        takes = data.draw(st.integers(0 if lacks < IN_FLIGHT else 1, lacks), label="steps that it takes now")
        told = log.since(lagging.next_step, max_tokens)
        assert told == entries[lagging.next_step : entry.step_id + 1], "those on their way go as they were"
        lagging.take(told[:takes])
        if entry.step_id >= comes_at:
            late.take(log.since(late.next_step, max_tokens))
            assert late.cache.rows == always.cache.rows
            assert late.next_step == always.next_step
        assert log.since(always.next_step, max_tokens) == []
        kept = log.since(0, max_tokens)[-min(IN_FLIGHT, entry.step_id + 1) :]
        assert kept == entries[: entry.step_id + 1][-IN_FLIGHT:], "recent steps are never joined to others, nor changed"
        assert log.whole
        assert log.nbytes == log.journal.nbytes + sum(entry.nbytes for entry in log.recent)
    lagging.take(log.since(lagging.next_step, max_tokens))
    assert lagging.cache.rows == always.cache.rows


@given(steps(max_steps=3 * IN_FLIGHT), st.integers(1, 40))
def test_the_steps_of_a_log_are_joined_within_the_limit(entries: list[Entry], max_tokens: int) -> None:
    told = log_of(entries).since(0, max_tokens)
    one_step = {(entry.rows, entry.step_id) for entry in entries}
    for entry in told:
        assert entry.rows * entry.tokens <= max_tokens or len(entry.parts) == 1
        assert (entry.rows, entry.step_id) in one_step
    assert [entry.step_id for entry in told] == sorted({entry.step_id for entry in told})


def test_a_consumer_between_joined_steps_is_told_that_they_are_lost() -> None:
    log = log_of([single(step_id) for step_id in range(2 * IN_FLIGHT)])
    assert [entry.step_id for entry in log.since(0, 40)] == [*range(IN_FLIGHT - 1, 2 * IN_FLIGHT)]
    assert [entry.step_id for entry in log.since(IN_FLIGHT, 40)] == [*range(IN_FLIGHT, 2 * IN_FLIGHT)]
    for next_step in range(1, IN_FLIGHT):
        assert not log.holds(next_step)
        with pytest.raises(SessionLost, match="one by one"):
            log.since(next_step, 40)


@given(steps(max_steps=2 * IN_FLIGHT), st.data())
def test_after_evictions_the_latest_step_is_still_there(entries: list[Entry], data: st.DataObject) -> None:
    log, consumer = StepLog(keeps_all=True), Consumer()
    for entry in entries:
        log.put(entry)
        consumer.take(log.since(entry.step_id, 40))
        if data.draw(st.booleans(), label="evict"):
            freed, before = log.evictable_bytes, log.nbytes
            log.evict()
            assert (log.nbytes, log.evictable_bytes) == (before - freed, 0)
        assert log.since(entry.step_id, 40) == [entry]
        assert log.journal.nbytes == sum(kept.nbytes for kept in log.journal.entries)
        if log.whole:
            newcomer = Consumer()
            newcomer.take(log.since(0, 40))
            assert newcomer.cache.rows == consumer.cache.rows
        else:
            assert 0 < log.kept_from <= entry.step_id
            assert log.journal.nbytes == 0, "half a journal is of no use to anybody"
            assert log.since(log.kept_from, 40) == entries[log.kept_from : entry.step_id + 1]
            with pytest.raises(SessionLost, match=f"before {log.kept_from} are no longer kept"):
                log.since(log.kept_from - 1, 40)


@given(steps(max_steps=2 * IN_FLIGHT), st.data())
def test_steps_that_were_taken_back_never_happened(entries: list[Entry], data: st.DataObject) -> None:
    """A pass of many steps, even: these are all kept until it is through."""
    log, original = StepLog(keeps_all=True), Consumer()
    for entry in entries:
        if taken_back := data.draw(st.integers(0, 2 * IN_FLIGHT), label="others before it"):
            for i in range(taken_back):
                ops = (CacheOp("reset"),) if i == 0 else ()
                other = Entry(i, 1, 1, (part([[99]]),), ops, entry.step_id + i)
                log.put(other, keep=max(IN_FLIGHT, i + 1))
            log.take_back(entry.step_id)
            assert log.since(entry.step_id, 40) == []
        log.put(entry)
        original.take([entry])
        newcomer = Consumer()
        newcomer.take(log.since(0, 40))
        assert newcomer.cache.rows == original.cache.rows
        assert log.nbytes == log.journal.nbytes + sum(entry.nbytes for entry in log.recent)


def test_a_step_that_was_taken_back_first_of_all() -> None:
    log = log_of([single(0)])
    log.take_back(0)
    assert log.whole
    assert log.since(0, 40) == []
    log.put(single(0))
    assert log.since(0, 40) == [single(0)]


def test_a_log_of_the_recent_steps_alone() -> None:
    log = StepLog(keeps_all=False)
    sent = [single(step_id) for step_id in range(2 * IN_FLIGHT)]
    for one in sent:
        log.put(one)
        assert log.since(one.step_id, 40) == [one]
        assert log.since(one.step_id + 1, 40) == []
        assert log.whole == (one.step_id < IN_FLIGHT)
        assert log.journal.nbytes == 0
    assert log.since(IN_FLIGHT, 40) == sent[IN_FLIGHT:]
    with pytest.raises(SessionLost):
        log.since(IN_FLIGHT - 1, 40)


def test_an_eviction_before_there_is_anything_to_forget_loses_nothing() -> None:
    log = StepLog(keeps_all=True)
    log.evict()
    log.put(single(0))
    log.evict()
    assert log.whole
    assert log.since(0, 40) == [single(0)]


def test_recent_steps_go_with_their_operations_and_those_before_them_without() -> None:
    first, second, third = single(0), single(1), replace(single(2, CacheOp("crop", (1,))), position=1)
    log = log_of([first, second, third])
    assert log.since(0, 40) == [first, second, third], "the crop is the consumer's to make"
    for step_id in range(3, 3 + IN_FLIGHT):
        log.put(replace(single(step_id), position=step_id - 1))
    joined, *recent = log.since(0, 40)
    assert (joined.step_id, joined.position, joined.tokens, joined.ops) == (2, 0, 2, ())
    assert hidden(joined) == [[0, 2]]
    assert recent == [replace(single(step_id), position=step_id - 1) for step_id in range(3, 3 + IN_FLIGHT)]


@given(steps(), st.integers(1, 40), st.integers(0, 5))
def test_what_is_told_survives_the_wire(entries: list[Entry], max_tokens: int, epoch: int) -> None:
    for entry in log_of(entries).since(0, max_tokens):
        step = entry.step(epoch)
        again = Entry.of(step)
        assert (again.position, again.tokens, again.rows, again.ops) == (
            entry.position,
            entry.tokens,
            entry.rows,
            entry.ops,
        )
        assert hidden(again) == hidden(entry)
        assert again.step(epoch) == step
