"""Receipts: what this peer computed with and what came out, told to each session's client under this peer's signature.

A line per step is noted when the step is through; they are signed many at once, since a signature takes a millisecond.
"""

from __future__ import annotations

import asyncio

from peer.session import Session
from protocol.identity import Identity
from protocol.limits import MAX_LINES
from protocol.receipts import Line, Receipt

RECEIPT_STEPS = 32  # a client hears of so many steps at once, where it does not ask


class Receipts:
    """Signs for this peer.

    Args:
        identity: whose receipts these are.
    """

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    async def due(self, session: Session) -> Receipt | None:
        """A receipt for the steps since the last one, once there are enough."""
        return await self.rest(session) if len(session.lines) >= RECEIPT_STEPS else None

    async def rest(self, session: Session) -> Receipt | None:
        """A receipt for all steps since the last one; None: there were none."""
        lines: list[Line] = []
        while session.lines and len(lines) < MAX_LINES:
            lines.append(session.lines.popleft())
        if not lines:
            return None
        return await asyncio.to_thread(Receipt.signed, lines, session.session_id, self._identity)
