import pytest

from peer.budget import KvBudget, MessageBudget
from protocol.errors import PeerFull


def test_kv_is_counted_in_block_tokens() -> None:
    budget = KvBudget(tokens=100, n_blocks=4)
    budget.reserve(2 * 50)  # 50 tokens of a session over two of the four blocks
    assert budget.tokens_left == 75
    with pytest.raises(PeerFull, match="75 of 100 tokens are left") as refusal:
        budget.reserve(301)
    assert refusal.value.retryable and refusal.value.retry_after_s
    assert budget.tokens_left == 75, "a refusal takes nothing"
    budget.release(2 * 50)
    assert budget.tokens_left == 100


def test_messages_are_counted_in_bytes() -> None:
    budget = MessageBudget(10)
    budget.reserve(10)
    with pytest.raises(PeerFull):
        budget.reserve(1)
    budget.release(10)
    assert budget.bytes_left == 10
