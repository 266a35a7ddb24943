import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.placement import choose_span
from protocol.errors import ConfigError
from protocol.span import Span

ANYWHERE = tuple(range(25))


@pytest.mark.parametrize(
    ("served", "num_blocks", "expected"),
    [
        ([], 24, "0:24"),
        ([], 8, "0:8"),
        (["0:8"], 8, "8:16"),
        (["0:8", "16:24"], 8, "8:16"),
        (["0:24", "0:12"], 4, "12:16"),
        (["0:10", "12:24"], 4, "8:12"),
        (["0:24"], 99, "0:24"),
    ],
)
def test_the_weakest_blocks_are_chosen(served: list[str], num_blocks: int, expected: str) -> None:
    assert str(choose_span(24, ANYWHERE, [Span.parse(s) for s in served], num_blocks)) == expected


def test_legal_cuts_are_kept() -> None:
    assert choose_span(24, (0, 6, 24), [], 8) == Span(0, 6)
    with pytest.raises(ConfigError, match="--num-blocks 6 at least"):
        choose_span(24, (0, 6, 24), [], 5)


@given(st.lists(st.tuples(st.integers(0, 22), st.integers(1, 24)).filter(lambda p: p[0] < p[1])), st.integers(1, 24))
def test_peers_that_come_one_after_the_other_cover_everything(served: list[tuple[int, int]], num_blocks: int) -> None:
    spans = [Span(*pair) for pair in served]
    for _ in range(24):
        spans.append(choose_span(24, ANYWHERE, spans, num_blocks))
    assert all(any(block in span for span in spans) for block in range(24))
