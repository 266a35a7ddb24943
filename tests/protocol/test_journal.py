"""Whatever was appended, a replay of the journal leaves a cache as the original steps left it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import SessionLost
from protocol.journal import Entry, Journal, StepLog
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


@given(steps(), st.integers(1, 40), st.data())
def test_a_consumer_that_comes_late_ends_as_one_that_was_there(
    entries: list[Entry], max_tokens: int, data: st.DataObject
) -> None:
    comes_at = data.draw(st.integers(0, len(entries) - 1), label="the step at which it comes")
    log, always, late = StepLog(keeps_all=True), Consumer(), Consumer()
    for entry in entries:
        log.put(entry)
        lacking = log.since(always.next_step, max_tokens)
        assert lacking == [entry], "whoever has all but the latest gets exactly that one"
        always.take(lacking)
        if entry.step_id >= comes_at:
            late.take(log.since(late.next_step, max_tokens))
            assert late.cache.rows == always.cache.rows
            assert late.next_step == always.next_step
        assert log.since(always.next_step, max_tokens) == []
        assert log.since(0, max_tokens)[-1] == entry, "the latest step is never joined to others, nor changed"
        assert log.whole


@given(steps(), st.integers(1, 40))
def test_the_steps_of_a_log_are_joined_within_the_limit(entries: list[Entry], max_tokens: int) -> None:
    told = log_of(entries).since(0, max_tokens)
    one_step = {(entry.rows, entry.step_id) for entry in entries}
    for entry in told:
        assert entry.rows * entry.tokens <= max_tokens or len(entry.parts) == 1
        assert (entry.rows, entry.step_id) in one_step
    assert [entry.step_id for entry in told] == sorted({entry.step_id for entry in told})


@given(steps(), st.data())
def test_after_evictions_the_latest_step_is_still_there(entries: list[Entry], data: st.DataObject) -> None:
    log, consumer = StepLog(keeps_all=True), Consumer()
    for entry in entries:
        log.put(entry)
        consumer.take(log.since(entry.step_id, 40))
        if data.draw(st.booleans(), label="evict"):
            log.evict()
        assert log.since(entry.step_id, 40) == [entry]
        assert log.journal.nbytes == sum(kept.nbytes for kept in log.journal.entries)
        if log.whole:
            newcomer = Consumer()
            newcomer.take(log.since(0, 40))
            assert newcomer.cache.rows == consumer.cache.rows
        else:
            assert 0 < log.kept_from <= entry.step_id
            assert log.journal.nbytes == 0, "half a journal is of no use to anybody"
            with pytest.raises(SessionLost, match=f"before {log.kept_from} are no longer kept"):
                log.since(log.kept_from - 1, 40)


@given(steps(), st.data())
def test_a_step_that_was_taken_back_never_happened(entries: list[Entry], data: st.DataObject) -> None:
    log, original = StepLog(keeps_all=True), Consumer()
    for entry in entries:
        if data.draw(st.booleans(), label="another step first"):
            log.put(Entry(0, 1, 1, (part([[99]]),), (CacheOp("reset"),), entry.step_id))
            log.take_back()
            assert log.since(entry.step_id, 40) == []
        log.put(entry)
        original.take([entry])
        newcomer = Consumer()
        newcomer.take(log.since(0, 40))
        assert newcomer.cache.rows == original.cache.rows
    assert log == log_of(entries)


def test_a_step_that_was_taken_back_first_of_all() -> None:
    log = log_of([single(0)])
    log.take_back()
    assert log.whole
    assert log.since(0, 40) == []
    log.put(single(0))
    assert log.since(0, 40) == [single(0)]


def test_a_log_of_the_latest_step_alone() -> None:
    log = StepLog(keeps_all=False)
    for step_id in range(4):
        log.put(single(step_id))
        assert log.since(step_id, 40) == [single(step_id)]
        assert log.since(step_id + 1, 40) == []
        assert log.whole == (step_id == 0)
        assert log.journal.nbytes == 0
    with pytest.raises(SessionLost):
        log.since(2, 40)


def test_an_eviction_before_there_is_a_journal_loses_nothing() -> None:
    log = StepLog(keeps_all=True)
    log.evict()
    log.put(single(0))
    log.evict()
    assert log.whole
    assert log.since(0, 40) == [single(0)]


def test_the_latest_step_goes_with_its_operations_and_those_before_it_without() -> None:
    log = log_of([single(0), single(1), replace(single(2, CacheOp("crop", (1,))), position=1)])
    assert [entry.step_id for entry in log.since(0, 40)] == [1, 2], "the crop is the consumer's to make"
    log.put(replace(single(3), position=2))
    joined, latest = log.since(0, 40)
    assert (joined.step_id, joined.position, joined.tokens, joined.ops) == (2, 0, 2, ())
    assert hidden(joined) == [[0, 2]]
    assert latest == replace(single(3), position=2)


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
