"""What a session is opened with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session is opened with: the model, its number of blocks, rows, and tokens per row (0: not known).

    `batch` and `max_tokens` are reserved on each peer. `is_routed`: do tokens choose among experts?
    """

    fingerprint: str
    n_blocks: int
    codec: str = "none"  # of results; inputs come encoded
    batch: int = 1
    max_tokens: int = 0
    stateless: bool = False
    is_routed: bool = False
