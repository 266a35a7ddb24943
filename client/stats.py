"""What happened to a session, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SessionStats:
    """What happened to a session so far."""

    steps: int = 0
    tokens: int = 0  # rows x tokens sent through the chain, replays not counted
    replayed_tokens: int = 0  # that the client itself sent again
    relayed: int = 0  # steps that the client carried from one hop to the next
    reroutes: int = 0  # hops that were replaced
    busy_s: float = 0.0  # in steps, recoveries counted
    compute_s: float = 0.0  # of these, what the peers computed, as they say
    bytes_sent: int = 0
    bytes_received: int = 0
