"""A journal: what went into a block boundary so far in a session, as it went over the wire. Replayed to a replacement.

A log, not a list of positions: after a rejected speculation one position has held several tokens. Crops compact it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from protocol.limits import MAX_TENSORS
from protocol.messages import ATTENTION_MASK, CacheOp, TensorSpec, token_axis

ROW_OPS = frozenset({"reorder", "select", "repeat"})


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor as it crossed the wire."""

    spec: TensorSpec
    payload: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One step's input at a boundary: `tokens` per row from `position` on, after `ops` were applied to the cache."""

    position: int
    tokens: int
    rows: int
    parts: tuple[Part, ...]
    ops: tuple[CacheOp, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(len(part.payload) for part in self.parts)

    def cropped(self, tokens: int) -> Entry:
        """The entry with its first `tokens` tokens only."""
        return replace(self, tokens=tokens, parts=tuple(self._cropped_parts(tokens)))

    def _cropped_parts(self, tokens: int) -> Iterator[Part]:
        seen: dict[str, int] = {}  # a joined entry has several parts of one name
        for part in self.parts:
            # An attention mask covers the past too.
            budget = (
                self.position + tokens if part.spec.name == ATTENTION_MASK else tokens - seen.get(part.spec.name, 0)
            )
            size = part.spec.keep or part.spec.shape[token_axis(part.spec.name)]
            seen[part.spec.name] = seen.get(part.spec.name, 0) + size
            if budget > 0:
                yield replace(part, spec=replace(part.spec, keep=min(budget, size)))


@dataclass(slots=True)
class Journal:
    """The entries of one boundary, in order."""

    entries: list[Entry] = field(default_factory=list)
    nbytes: int = 0
    _carried_ops: tuple[CacheOp, ...] = ()  # operations of entries that a crop removed

    def append(self, entry: Entry) -> None:
        """Adds a step's input. Its crops and resets are applied to the journal itself; other operations stay in it."""
        ops: list[CacheOp] = []
        for op in entry.ops:
            if op.kind == "crop":
                self._crop(op.values[0])
            elif op.kind == "reset":
                self.clear()
                ops.clear()
            else:
                ops.append(op)
        ops[:0] = self._carried_ops
        if not self.entries:  # an empty cache has no rows to move
            ops = [op for op in ops if op.kind not in ROW_OPS]
        kept = replace(entry, ops=tuple(ops))
        self._carried_ops = ()
        self.entries.append(kept)
        self.nbytes += kept.nbytes

    def clear(self) -> None:
        self.entries.clear()
        self.nbytes, self._carried_ops = 0, ()

    def _crop(self, tokens: int) -> None:
        dropped: list[CacheOp] = []
        while self.entries and self.entries[-1].position >= tokens:
            entry = self.entries.pop()
            self.nbytes -= entry.nbytes
            dropped[:0] = entry.ops
        self._carried_ops = (*dropped, *self._carried_ops)
        if self.entries and self.entries[-1].position + self.entries[-1].tokens > tokens:
            last = self.entries.pop()
            self.nbytes -= last.nbytes
            last = last.cropped(tokens - last.position)
            self.entries.append(last)
            self.nbytes += last.nbytes

    def batches(self, max_tokens: int) -> Iterator[Entry]:
        """The entries, neighbours joined where nothing happened between them, up to `max_tokens` rows x tokens."""
        joined: Entry | None = None
        for entry in self.entries:
            if joined is not None and _joinable(joined, entry, max_tokens):
                joined = _join(joined, entry)
                continue
            if joined is not None:
                yield joined
            joined = entry
        if joined is not None:
            yield joined


def _joinable(first: Entry, second: Entry, max_tokens: int) -> bool:
    return (
        not second.ops
        and first.rows == second.rows
        and first.rows * (first.tokens + second.tokens) <= max_tokens
        and len(first.parts) + len(second.parts) <= MAX_TENSORS
        and _names(first) == _names(second)
    )


def _names(entry: Entry) -> set[str]:
    return {part.spec.name for part in entry.parts}


def _join(first: Entry, second: Entry) -> Entry:
    """Both as one step: the parts of both, but only the later attention mask, which covers all tokens."""
    parts = tuple(part for part in first.parts if part.spec.name != ATTENTION_MASK)
    return replace(first, tokens=first.tokens + second.tokens, parts=parts + second.parts)
