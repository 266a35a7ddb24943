"""Into how many chunks a prompt is best cut, so that all hops of a chain work on it at once. Pure.

C chunks through S hops take as long as one chunk through all hops, and C - 1 more through the slowest: many small ones
keep all hops busy. But each costs every hop the reading of its weights, and a message; and hops that share a device
only take turns on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 64  # rows x tokens of a chunk: fewer take hardly less time
GOOD_ENOUGH = 1.15  # of the least time: fewer chunks lose less where hops share a machine, or times are not as expected
MOST_CHUNKS = 64  # that are considered, beyond as many as there must be


@dataclass(frozen=True, slots=True)
class HopCost:
    """What a hop takes for a step, in milliseconds.

    Attributes:
        step_ms: however few tokens it has: a decode step's time.
        token_ms: for each token of each row of a prefill, beside that.
        device: on which it computes; hops of one chain may share it.
    """

    step_ms: float
    token_ms: float
    device: str


def chunk_tokens(tokens: int, rows: int, hops: Sequence[HopCost], max_tokens: int) -> int:
    """Tokens per row of each chunk of a prompt, the last of which may be shorter; `tokens`: it is not to be cut.

    Args:
        tokens: per row.
        max_tokens: rows x tokens of one chunk.
    """
    fewest = -(-tokens // max(1, max_tokens // rows))
    most = max(fewest, min(tokens, tokens * rows // LEAST_TOKENS, fewest + MOST_CHUNKS))
    times_ms = {count: _passed_ms(-(-tokens // count) * rows, count, hops) for count in range(fewest, most + 1)}
    limit_ms = GOOD_ENOUGH * min(times_ms.values())
    count = min(count for count, ms in times_ms.items() if ms <= limit_ms)
    return -(-tokens // count)


def _passed_ms(tokens: int, count: int, hops: Sequence[HopCost]) -> float:
    """Until `count` chunks of so many rows x tokens are through all hops."""
    busy_ms: dict[str, float] = {}
    for hop in hops:
        busy_ms[hop.device] = busy_ms.get(hop.device, 0.0) + hop.step_ms + tokens * hop.token_ms
    return sum(busy_ms.values()) + (count - 1) * max(busy_ms.values(), default=0.0)
