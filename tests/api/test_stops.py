"""Strings that end an answer, however they are cut into pieces."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from client.api.stops import Stops

texts = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(edges)]


def shown(watch: Stops, pieces: list[str]) -> str:
    return "".join(watch.add(piece) for piece in pieces) + watch.end()


@given(texts, stops, st.lists(st.integers(0, 100), max_size=8))
def test_what_is_shown_ends_before_a_stop(text: str, strings: list[str], cuts: list[int]) -> None:
    watch = Stops(strings)
    seen = shown(watch, pieces_of(text, cuts))
    assert text.startswith(seen)
    if watch.found is None:
        assert seen == text
        assert not any(string in text for string in strings)
    else:
        assert text[len(seen) :].startswith(watch.found)
        assert not any(string in seen for string in strings)


@given(texts, st.text(alphabet="abc", min_size=1, max_size=4), st.lists(st.integers(0, 100), max_size=8))
def test_the_cuts_do_not_matter(text: str, string: str, cuts: list[int]) -> None:
    whole, cut = Stops([string]), Stops([string])
    assert shown(whole, [text]) == shown(cut, pieces_of(text, cuts)) == text.partition(string)[0]


@given(texts, st.text(alphabet="abc", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_one(text: str, string: str) -> None:
    watch = Stops([string])
    seen = watch.add(text)
    if watch.found is None:
        assert string.startswith(text[len(seen) :])


def test_what_follows_is_kept_apart() -> None:
    watch = Stops(["##"])
    assert watch.add("a#") == "a"
    assert watch.add("#b") == ""
    assert (watch.found, watch.rest) == ("##", "b")
    assert watch.add("c") == ""
