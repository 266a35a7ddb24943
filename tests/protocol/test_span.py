from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigError
from protocol.span import Span, missing_spans


def spans(limit: int = 40) -> st.SearchStrategy[Span]:
    pairs = st.tuples(st.integers(0, limit - 1), st.integers(1, limit))
    return pairs.filter(lambda p: p[0] < p[1]).map(lambda p: Span(*p))


@given(spans())
def test_text_round_trip(span: Span) -> None:
    assert Span.parse(str(span)) == span


@pytest.mark.parametrize("text", ["", "10", "10:", ":20", "20:10", "5:5", "-1:3", "a:b", "1:2:3"])
def test_nonsense_is_a_users_mistake_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="10:20"):
        Span.parse(text)


@given(st.lists(spans()), st.integers(1, 40))
def test_missing_spans_are_exactly_the_uncovered_blocks(covered: list[Span], n_blocks: int) -> None:
    gaps = missing_spans(covered, n_blocks)
    uncovered = {b for b in range(n_blocks) if not any(b in span for span in covered)}
    assert {b for gap in gaps for b in range(gap.start, gap.stop)} == uncovered
    assert all(first.stop < second.start for first, second in pairwise(gaps)), "gaps are maximal"


@given(spans(), spans())
def test_overlap_is_the_common_blocks(a: Span, b: Span) -> None:
    common = {x for x in range(a.start, a.stop) if x in b}
    overlap = a.overlap(b)
    assert common == (set(range(overlap.start, overlap.stop)) if overlap else set())
    assert a.covers(b) == (len(common) == len(b))
