"""What is typical of the tokens that were compared last."""

from __future__ import annotations

import pytest
import torch

from client.sample import LEAST, MOST, SEVERAL, Compared, Sample

LIMIT = 0.1
STEP = torch.zeros(1, 1, 512, 4)  # what tokens are views of


def tokens(start: int, apart: list[float]) -> list[Compared]:
    token = STEP.narrow(-2, 0, 1)
    return [Compared(0, position, token, token, each) for position, each in enumerate(apart, start)]


def test_a_few_odd_tokens_are_not_typical() -> None:
    sample = Sample()
    assert sample.take(tokens(0, [5.0] * (LEAST - 1)), LIMIT) is None, "too few to say anything"
    assert sample.take(tokens(LEAST - 1, [0.01] * 200), LIMIT) is not None, "most of the first ones are too far off"
    sample = Sample()
    assert sample.take(tokens(0, ([5.0] + [0.01] * 2) * 100), LIMIT) is None


def test_many_faint_ones_are_found_over_several_audits() -> None:
    sample = Sample()
    assert sample.take(tokens(3, [0.2] * 10), LIMIT) is None
    far = sample.take(tokens(13, [0.2] * 10), LIMIT)
    assert far is not None
    assert [token.position for token in far.tokens] == list(range(3, 3 + LEAST))
    assert sample.first == far.first == 3
    assert far.is_typical


@pytest.mark.parametrize("at_once", [1, 7, 400])
def test_who_begins_late_is_found_within_the_tokens_that_are_kept(at_once: int) -> None:
    sample, apart, far = Sample(), [0.01] * 200 + [0.2] * 200, None
    for start in range(0, 400, at_once):
        far = sample.take(tokens(start, apart[start : start + at_once]), LIMIT)
        if far is not None:
            break
    assert far is not None
    assert len(far.tokens) == MOST
    assert far.tokens[-1].position == 200 + MOST // 2, "more than half of them"
    assert sample.first == far.first == 0


def test_tokens_that_were_taken_back_do_not_count() -> None:
    sample = Sample()
    assert sample.take(tokens(0, [0.01] * 8 + [0.2] * 7), LIMIT) is None
    for _ in range(3):
        assert sample.take(tokens(8, [0.2] * 7), LIMIT) is None, "the same positions again"
    assert sample.take(tokens(8, [0.2] * 9), LIMIT) is not None
    assert sample.take([], LIMIT) is None


@pytest.mark.parametrize("at_once", [1, 7, 400])
def test_several_that_stand_out_are_found_where_one_may(at_once: int) -> None:
    seldom, often = ([2.0] + [0.01] * (every - 1) for every in (MOST // (SEVERAL - 1) + 1, MOST // (SEVERAL + 1)))
    for period, is_found in ((seldom, False), (often, True)):
        sample, apart, found = Sample(), period * 10, []
        for start in range(0, len(apart), at_once):
            if far := sample.take(tokens(start, apart[start : start + at_once]), LIMIT, alone=1.0):
                found.append(far)
        assert bool(found) == is_found
        for far in found[:1]:
            assert [token.apart for token in far.tokens] == [2.0] * SEVERAL
            assert (far.limit, far.first, far.is_typical) == (1.0, 0, False)


def test_what_is_kept_does_not_keep_whole_steps() -> None:
    sample = Sample()
    sample.take(tokens(0, [0.01] * 400), LIMIT)
    assert len(sample._kept) == MOST
    assert all(each.committed.untyped_storage().nbytes() == 16 for each in sample._kept)
