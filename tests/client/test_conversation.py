"""What of a conversation is kept on the peers, and what is sent again."""

import pytest
import torch
from torch import Tensor

from client.conversation import GenerationSession


def ids(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def after(sequence: Tensor) -> GenerationSession:
    """A session in which `sequence` was generated: the peers have all but its last token."""
    session = GenerationSession(0)
    session.align(sequence[:, :2])
    session.cache.n_tokens = sequence.shape[1] - 1
    session.note(sequence)
    return session


@pytest.mark.parametrize(
    ("following", "kept", "cropped"),
    [
        (ids(1, 2, 3, 4, 5, 6), 3, False),  # goes on: all that the peers have is used
        (ids(1, 2, 3, 4), 3, False),  # the same again: its last token was never sent
        (ids(1, 2, 3), 2, True),  # `generate` needs one token to begin with
        (ids(1, 2, 9, 9, 9), 2, True),  # another turn of the conversation
    ],
)
def test_the_common_beginning_is_kept(following: Tensor, kept: int, cropped: bool) -> None:
    session = after(ids(1, 2, 3, 4))
    cache = session.cache
    assert session.align(following) is cache
    assert cache.n_tokens == kept
    assert [op.kind for op in cache.pending] == (["crop"] if cropped else [])


@pytest.mark.parametrize("other", [ids(9, 9, 9), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])])
def test_another_conversation_begins_anew(other: Tensor) -> None:
    session = after(ids(1, 2, 3, 4))
    before = session.cache
    assert session.align(other) is not before
    assert session.cache.n_tokens == 0


def test_rows_must_agree_in_all() -> None:
    session = after(torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]]))
    assert session.align(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])).n_tokens == 2


def test_after_beams_nothing_is_kept() -> None:
    session = after(ids(1, 2, 3, 4))
    session.note(None)
    assert session.align(ids(1, 2, 3, 4, 5)).n_tokens == 0
