"""What followed before: the index against a look at the whole text."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from client.ngrams import LONGEST_MATCH, LONGEST_NGRAM, NgramIndex

texts = st.lists(st.integers(0, 3), max_size=60)


def agreeing(text: list[int], position: int) -> int:
    """How many tokens before `position` are those at the end."""
    length = 0
    while length < min(LONGEST_MATCH, position) and text[position - length - 1] == text[len(text) - length - 1]:
        length += 1
    return length


@given(texts, st.integers(0, 60))
def test_finds_the_latest_place_of_the_longest_ngram(text: list[int], cut: int) -> None:
    index = NgramIndex(text[:cut])
    index.extend(text[cut:])
    places = [(min(LONGEST_NGRAM, agreeing(text, position)), position) for position in range(1, len(text))]
    longest, position = max(places, default=(0, 0))
    found = index.match()
    if longest == 0:
        assert found is None
    else:
        assert found is not None
        assert (found.position, found.length) == (position, agreeing(text, position))


def test_what_repeats_goes_on_repeating() -> None:
    index = NgramIndex([9, 1, 2, 3, 1, 2, 3])
    match = index.match()
    assert match is not None
    assert index.continuation(match, 7) == [1, 2, 3, 1, 2, 3, 1]
