"""Which blocks to serve when the user named none. Pure; simple for now: the least covered window of legal cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from protocol.errors import ConfigError
from protocol.span import Span


def choose_span(n_blocks: int, legal_cuts: Sequence[int], served: Iterable[Span], num_blocks: int) -> Span:
    """The span of at most `num_blocks` blocks between legal cuts where the swarm is weakest.

    Windows are compared by their blocks' replica counts, fewest first: one block that nobody serves outweighs any
    number that somebody does. Among equals the longer window wins, then the earlier one.

    Raises:
        ConfigError: no two legal cuts are `num_blocks` or fewer blocks apart.
    """
    replicas = [0] * n_blocks
    for span in served:
        for block in range(span.start, min(span.stop, n_blocks)):
            replicas[block] += 1
    windows = [Span(start, stop) for start in legal_cuts for stop in legal_cuts if 0 < stop - start <= num_blocks]
    if not windows:
        smallest = min(b - a for a, b in pairwise(legal_cuts))
        raise ConfigError(
            f"this model cannot be cut into spans of {num_blocks} blocks; --num-blocks {smallest} at least"
        )
    most = max(replicas)

    def weakness(span: Span) -> tuple[list[int], int, int]:
        counts = [0] * (most + 1)
        for block in range(span.start, span.stop):
            counts[replicas[block]] += 1
        return (counts, len(span), -span.start)

    return max(windows, key=weakness)
