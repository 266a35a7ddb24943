"""What a pass is made of: everybody's next token, a fair part of prompts, nobody's load on somebody else's back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.scheduler import GATHERING, LATE, LEAST_PIECE, SHARED, CostModel, Costs, Due, Piece, Scheduler, Waiting
from protocol.span import Span

SPAN = Span(0, 4)
COSTS = Costs(pass_ms=10.0, token_ms=1.0)
MAX_BATCH, MAX_TOKENS = 16, 512


def scheduler(prefill_share: float = 0.5) -> Scheduler:
    return Scheduler(MAX_BATCH, MAX_TOKENS, prefill_share)


def decode(number: int, client: str = "a", tokens: int = 1, span: Span = SPAN, *, packs: bool = True) -> Waiting:
    return Waiting(number, client, span, tokens, packs, decodes=True)


def prefill(number: int, client: str = "a", tokens: int = 400, *, packs: bool = True) -> Waiting:
    return Waiting(number, client, SPAN, tokens, packs, decodes=False)


def test_nothing_waits() -> None:
    assert scheduler().step([], COSTS, 0) == ()


def test_decode_steps_share_a_pass() -> None:
    waiting = [decode(i, f"client {i % 3}") for i in range(6)]
    assert set(scheduler().step(waiting, COSTS, 6)) == {Piece(i, 1) for i in range(6)}


def test_a_pass_has_its_bounds() -> None:
    assert len(scheduler().step([decode(i) for i in range(99)], COSTS, 99)) == MAX_BATCH
    pieces = scheduler().step([prefill(i, tokens=300) for i in range(3)], COSTS, 0)
    assert sum(piece.tokens for piece in pieces) == MAX_TOKENS


def test_what_cannot_be_packed_has_a_pass_of_its_own() -> None:
    one = scheduler()
    waiting = [decode(0, packs=False), decode(1), decode(2)]
    assert one.step(waiting, COSTS, 3) == (Piece(0, 1),)
    assert one.step(waiting[1:], COSTS, 3) == (Piece(1, 1), Piece(2, 1))


def test_only_steps_over_the_same_blocks_share_a_pass() -> None:
    waiting = [decode(0), decode(1, span=Span(1, 4)), decode(2)]
    assert set(scheduler().step(waiting, COSTS, 3)) == {Piece(0, 1), Piece(2, 1)}


def test_a_prompt_that_is_alone_is_read_at_once() -> None:
    assert scheduler().step([prefill(0, tokens=400)], COSTS, 0) == (Piece(0, 400),)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.7])
def test_prompts_take_their_share_of_the_time_while_sessions_decode(share: float) -> None:
    """Also in a pass in which these happen to have no step: they are elsewhere in their chains, and will come."""
    decodes = [decode(i, f"client {i}") for i in range(7)]
    for waiting in ([*decodes, prefill(7, "long")], [prefill(7, "long")]):
        pieces = scheduler(share).step(waiting, COSTS, decoding=7)
        assert {piece.number for piece in pieces} == {step.number for step in waiting}
        prompt_ms = sum(piece.tokens for piece in pieces if piece.number == 7) * COSTS.token_ms
        assert prompt_ms == pytest.approx(COSTS.of(7) * share / (1 - share), abs=COSTS.token_ms)


def test_prompts_are_read_one_after_the_other() -> None:
    """Two that take turns would both be late."""
    one = scheduler()
    waiting = [decode(0, "a"), prefill(1, "b"), prefill(2, "c")]
    pieces = one.step(waiting, COSTS, 1)
    assert [piece.number for piece in pieces] == [0, 1]


def test_a_guess_of_several_tokens_goes_whole() -> None:
    pieces = scheduler().step([decode(0, tokens=9), decode(1)], COSTS, 2)
    assert set(pieces) == {Piece(0, 9), Piece(1, 1)}


# ---------------------------------------------------------------------- fairness


def test_a_greedy_client_does_not_slow_another_one_down_by_more_than_its_share() -> None:
    """One session against a hundred: it is in every pass, and none takes more than twice what it would alone."""
    one = scheduler()
    numbers = iter(range(10_000))
    greedy = [decode(next(numbers), "greedy") for _ in range(100)]
    served: Counter[int] = Counter()
    for _ in range(50):
        modest = decode(next(numbers), "modest")
        pieces = one.step([*greedy, modest], COSTS, 101)
        assert modest.number in {piece.number for piece in pieces}
        assert COSTS.of(sum(piece.tokens for piece in pieces)) <= 2 * COSTS.of(1)
        done = {piece.number for piece in pieces}
        served.update(len(done & {step.number}) for step in greedy if step.number in done)
        greedy = [step for step in greedy if step.number not in done]
        greedy += [decode(next(numbers), "greedy") for _ in range(100 - len(greedy))]
    assert served.total() == 50 * 8, "the rest of the pass is the other one's, but for some time around it"


@pytest.mark.parametrize("present", [True, False])
def test_a_flood_of_sessions_and_prompts_does_not_double_a_pass(present: bool) -> None:
    """Neither one with the modest client's step in it, nor one that this would have to wait for."""
    one = scheduler()
    costs = Costs(pass_ms=16.0, token_ms=1.0)
    greedy = [decode(n, "greedy") for n in range(60)] + [prefill(n, "greedy", 256) for n in range(60, 90)]
    with_prompts = 0
    for turn in range(20):
        waiting = [*greedy, decode(1000 + turn, "modest")] if present else greedy
        pieces = one.step(waiting, costs, 61, {"greedy", "modest"})
        assert costs.of(sum(piece.tokens for piece in pieces)) <= 2 * costs.of(1)
        assert not present or 1000 + turn in {piece.number for piece in pieces}
        with_prompts += any(60 <= piece.number < 1000 for piece in pieces)
    assert with_prompts >= 10, "prompts go on, if slowly"


def test_a_clients_prompt_does_not_starve_its_own_decode_steps() -> None:
    """Where its part of the pass is too small for both."""
    one = scheduler()
    costs = Costs(pass_ms=16.0, token_ms=4.0)
    decodes, numbers, served, read = [decode(n, "busy") for n in range(6)], itertools.count(1000), Counter[int](), 0
    for _ in range(40):
        waiting = [*decodes, prefill(99, "busy"), decode(next(numbers), "modest")]
        pieces = one.step(waiting, costs, 7, {"busy", "modest"})
        assert costs.of(sum(piece.tokens for piece in pieces)) <= costs.of(1 + LEAST_PIECE)
        done = {piece.number for piece in pieces}
        read += sum(piece.tokens for piece in pieces if piece.number == 99)
        served.update(step.number % 6 for step in decodes if step.number in done)
        decodes = [step for step in decodes if step.number not in done] + [
            decode(step.number + 6 * 1000, "busy") for step in decodes if step.number in done
        ]
    assert read >= 20 * LEAST_PIECE
    assert min(served[n] for n in range(6)) >= 5, served


def test_a_third_clients_prompt_is_not_starved_by_a_flood() -> None:
    one = scheduler()
    costs = Costs(pass_ms=16.0, token_ms=1.0)
    greedy = [decode(n, "greedy") for n in range(60)] + [prefill(n, "greedy", 256) for n in range(60, 90)]
    read = 0
    for turn in range(20):
        waiting = [*greedy, decode(1000 + turn, "modest"), prefill(99, "third", 400)]
        pieces = one.step(waiting, costs, 61, {"greedy", "modest"})
        assert costs.of(sum(piece.tokens for piece in pieces)) <= 3 * costs.of(1)
        read += sum(piece.tokens for piece in pieces if piece.number == 99)
    assert read > 100


def test_who_is_alone_fills_the_pass() -> None:
    assert len(scheduler().step([decode(i, "greedy") for i in range(12)], Costs(1.0, 100.0), 12)) == 12


def test_prompts_of_clients_take_turns() -> None:
    """A client that keeps sending prompts does not keep another one's waiting behind them."""
    one = scheduler()
    numbers = iter(range(1000))
    waiting = {n: prefill(n, "greedy", 500) for n in (next(numbers) for _ in range(8))}
    late = next(numbers)
    waiting[late] = prefill(late, "modest", 500)
    first = None
    for turn in range(4):
        for piece in one.step(list(waiting.values()), COSTS, 0):
            step = waiting.pop(piece.number)
            if piece.tokens < step.tokens:
                waiting[step.number] = prefill(step.number, step.client, step.tokens - piece.tokens)
            elif step.number == late and first is None:
                first = turn
    assert first is not None and first <= 2


def test_who_was_away_has_saved_nothing_up() -> None:
    one = scheduler()
    for number in range(20):
        one.step([decode(number, "busy", packs=False)], COSTS, 1)
    order = []
    waiting = [decode(100 + i, client, packs=False) for i, client in enumerate(["busy", "new"] * 3)]
    while waiting:
        (piece,) = one.step(waiting, COSTS, 2)
        order.append(next(step.client for step in waiting if step.number == piece.number))
        waiting = [step for step in waiting if step.number != piece.number]
    assert order.count("new") == 3 and order[:4].count("new") == 2


@given(
    st.lists(
        st.builds(
            lambda client, tokens, packs, long: (client, tokens + (16 if long else 0), packs, long),
            st.sampled_from("abc"),
            st.integers(1, 16),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 30),
)
def test_everything_is_computed_in_the_end(steps: list[tuple[str, int, bool, bool]], decoding: int) -> None:
    """Each pass does something, no step is given more tokens than it has, and none waits for ever."""
    one = scheduler()
    waiting = {
        n: Waiting(n, client, SPAN, tokens, packs, decodes=not long)
        for n, (client, tokens, packs, long) in enumerate(steps)
    }
    for _ in range(200):
        pieces = one.step(list(waiting.values()), COSTS, decoding)
        assert bool(pieces) == bool(waiting)
        assert len({piece.number for piece in pieces}) == len(pieces) <= MAX_BATCH
        for piece in pieces:
            step = waiting.pop(piece.number)
            assert 1 <= piece.tokens <= step.tokens
            if step.decodes or not step.packs:
                assert piece.tokens == step.tokens
            if left := step.tokens - piece.tokens:
                waiting[step.number] = Waiting(step.number, step.client, SPAN, left, step.packs, step.decodes)
        if not waiting:
            return
    raise AssertionError(f"these still wait: {waiting}")


# ---------------------------------------------------------------------- costs, and waiting for more


def test_costs_are_learned_from_passes() -> None:
    model = CostModel()
    guess = model.now(8.0)
    assert guess.pass_ms == 8.0 and 0 < guess.token_ms < 8.0
    for _ in range(60):
        model.note(1, COSTS.of(1))
        model.note(100, COSTS.of(100))
        model.note(7, COSTS.of(7))
    learned = model.now(8.0)
    for tokens in (1, 7, 50, 100, 200):
        assert learned.of(tokens) == pytest.approx(COSTS.of(tokens), rel=0.1)


def test_costs_are_those_of_passes_alike() -> None:
    """Eight tokens may take as long as thirty."""
    model = CostModel()
    for tokens, took_ms in ((1, 10.0), (8, 40.0), (30, 42.0), (500, 400.0)):
        model.note(tokens, took_ms)
    costs = model.now(None)
    assert [costs.of(n) for n in (8, 30, 500)] == [40.0, 42.0, 400.0]
    assert costs.of(4) == pytest.approx(25.0) and costs.of(1000) == pytest.approx(790.0)
    assert costs.most(42.0, 512) == 30 and costs.most(24.0, 512) == 3 and costs.most(5.0, 512) == -1
    assert costs.most(1e6, 512) == 512


def test_costs_grow_with_tokens_whatever_was_measured() -> None:
    model = CostModel()
    for tokens, took_ms in ((1, 10.0), (8, 40.0), (30, 20.0)):
        model.note(tokens, took_ms)
    costs = model.now(None)
    assert all(costs.of(n) < costs.of(n + 1) for n in range(100))


def test_costs_are_never_nothing() -> None:
    model = CostModel()
    model.note(1, 0.0)
    model.note(100, 0.0)
    assert model.now(None).pass_ms > 0 and model.now(None).token_ms > 0


def patience_ms(waiting: Sequence[Waiting], waited_ms: float, *due_ms: float, client: str = "a") -> float:
    due = [Due(client, each) for each in due_ms]
    return scheduler().patience_ms(waiting, waited_ms, due, COSTS)


LATE_MS, MOST_MS, SOON_MS = LATE * COSTS.pass_ms, GATHERING * COSTS.pass_ms, 0.3 * COSTS.pass_ms


def test_a_pass_waits_for_steps_that_are_due_within_less_than_another_pass() -> None:
    one = [decode(0)]
    assert patience_ms(one, 0, SOON_MS, 0.0) == pytest.approx(SOON_MS + LATE_MS)
    assert patience_ms(one, 0, SOON_MS, 9 * COSTS.pass_ms) == pytest.approx(SOON_MS + LATE_MS), "one is elsewhere"
    assert patience_ms(one, 0, 0.7 * COSTS.pass_ms) == pytest.approx(MOST_MS)
    assert patience_ms(one, MOST_MS - 1, 0.5) == pytest.approx(1)
    assert patience_ms(one, MOST_MS, 0.5) == 0, "it has waited long enough"
    assert patience_ms(one, 0, -LATE_MS / 2) == pytest.approx(LATE_MS / 2)
    assert patience_ms(one, 0, -2 * LATE_MS) == 0, "who is overdue is not waited for"
    assert patience_ms([decode(i) for i in range(3)], 0) == 0, "all are there"
    assert patience_ms([prefill(0)], 0, SOON_MS) == 0, "what waits is a prompt"
    assert patience_ms([decode(i) for i in range(MAX_BATCH)], 0, SOON_MS) == 0, "the pass is full"


@pytest.mark.parametrize(
    "theirs", [[prefill(0, "b")], [decode(i, "b") for i in range(60)], [decode(0, "b", packs=False)]], ids=str
)
def test_a_pass_waits_for_the_client_that_has_no_part_in_it(theirs: Sequence[Waiting]) -> None:
    """Its step would come a moment after the pass began, and wait for all of it."""
    assert patience_ms(theirs, 0, SOON_MS) == pytest.approx(SOON_MS + LATE_MS)
    assert patience_ms(theirs, 0, SOON_MS, client="b") == 0, "their own would be in a later pass in any case"
    assert patience_ms([*theirs, prefill(99, "a")], 0, SOON_MS) > 0, "a prompt of its own is none"
    assert patience_ms(theirs, MOST_MS, SOON_MS) == 0
    assert patience_ms(theirs, 0, 2 * COSTS.pass_ms) == 0


def test_a_full_pass_waits_for_nobody_who_would_not_be_in_it() -> None:
    assert patience_ms([*(decode(i, "b") for i in range(60)), decode(99, "a")], 0, SOON_MS) == 0, "it has its part"
    assert patience_ms([decode(i, f"client {i}") for i in range(MAX_BATCH)], 0, SOON_MS) == 0


def test_who_has_few_steps_waits_for_one_who_has_more_no_longer_than_a_pass_may_cost() -> None:
    limit_ms = SHARED * 2 * COSTS.of(1)
    equal, more = [decode(0, "a"), decode(1, "b")], [decode(0, "a"), *(decode(i, "b") for i in range(1, 5))]
    assert patience_ms(equal, 0, 0.7 * COSTS.pass_ms, client="b") == pytest.approx(MOST_MS)
    assert patience_ms(more, 0, 1.0, client="b") == pytest.approx(limit_ms - COSTS.of(6))
    assert patience_ms(more, 2.0, 1.0, client="b") == pytest.approx(limit_ms - COSTS.of(6) - 2.0)
    assert patience_ms(more, 0, 0.7 * COSTS.pass_ms, client="b") == 0
    assert patience_ms([*more, prefill(9, "b")], 0, 1.0, client="b") == 0, "a piece of the prompt is in the pass, too"
    assert patience_ms(more, 0, 0.7 * COSTS.pass_ms, client="a") == pytest.approx(MOST_MS), "they gain by it"
