"""What was done to the rows of a session's caches, step by step: a shadow has to do the same. Pure.

Peers recall operations with their outputs, but their digests do not cover these: what counts is what the client asked
for. A crop follows from where the next step starts, and commutes with all that is done to rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.errors import SessionLost
from protocol.journal import ROW_OPS, Entry
from protocol.limits import MAX_CACHE_OPS
from protocol.messages import CacheOp


@dataclass(slots=True)
class Moves:
    """Of one session."""

    _ops: dict[int, tuple[CacheOp, ...]] = field(default_factory=dict)

    def note(self, entry: Entry) -> None:
        """A step was made, after its operations."""
        ops = tuple(op for op in entry.ops if op.kind in ROW_OPS or op.kind == "reset")
        if ops:
            self._ops[entry.step_id] = ops

    def before(self, entry: Entry, next_step: int, *, is_empty: bool) -> tuple[CacheOp, ...]:
        """What was done to rows before this step, from the step `next_step` on: also in steps that were taken back
        since, or joined with this one.

        Args:
            is_empty: no step was made before `next_step`, and there are no rows that could be moved.

        Raises:
            SessionLost: everything was forgotten meanwhile; or too much was done for one step.
        """
        if is_empty:
            return ()
        found: list[CacheOp] = []
        for step_id in range(next_step, entry.step_id + 1):
            found += self._ops.get(step_id, ())
        if any(op.kind == "reset" for op in found):
            raise SessionLost("the session began anew meanwhile")
        if len(found) >= MAX_CACHE_OPS:  # a crop may come besides
            raise SessionLost("rows were moved more often than a step can say")
        return tuple(found)
