"""A journal: what crossed a block boundary so far in a session, as it went over the wire. Replayed to a replacement.

A log, not a list of positions: after a rejected speculation one position has held several tokens. Crops compact it.
Whoever stands before a boundary keeps its `StepLog`: the client that of block 0, each peer that of its span's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce

from protocol.errors import SessionLost
from protocol.limits import IN_FLIGHT, MAX_TENSORS
from protocol.messages import ATTENTION_MASK, HIDDEN, CacheOp, HopTrace, Step, TensorSpec, token_axis
from protocol.receipts import digest

REPLAY_TOKENS = 512  # rows x tokens of one step that is sent again: several joined
ROW_OPS = frozenset({"reorder", "select", "repeat"})


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor as it crossed the wire."""

    spec: TensorSpec
    payload: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Entry:
    """One step's input at a boundary: `tokens` per row from `position` on, after `ops` were applied to the cache."""

    position: int
    tokens: int
    rows: int
    parts: tuple[Part, ...]
    ops: tuple[CacheOp, ...] = ()
    step_id: int = 0
    trace: tuple[HopTrace, ...] = ()

    @classmethod
    def of(cls, step: Step) -> Entry:
        """What a step brings; its bytes are views of the step's payload."""
        parts = tuple(Part(spec, payload) for spec, payload in step.parts())
        hidden = [spec for spec in step.tensors if spec.name == HIDDEN]
        tokens = sum(spec.keep or spec.shape[-2] for spec in hidden)
        rows = hidden[0].shape[-3] if hidden else 0
        return cls(step.position, tokens, rows, parts, step.ops, step.step_id, step.trace)

    def step(self, epoch: int) -> Step:
        """The entry as it travels."""
        specs = tuple(part.spec for part in self.parts)
        payload = b"".join(part.payload for part in self.parts)
        return Step(epoch, self.step_id, self.position, specs, payload, self.ops, self.trace)

    @property
    def nbytes(self) -> int:
        return sum(len(part.payload) for part in self.parts)

    def digest(self) -> bytes:
        """See `protocol.receipts.digest`."""
        return digest(self.position, ((part.spec, part.payload) for part in self.parts))

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
        """The entries, neighbours joined where nothing happened between them, up to `max_tokens` rows x tokens. A
        joined entry goes by its last step's id."""
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


@dataclass(slots=True)
class StepLog:
    """All steps that crossed one boundary, for whoever is told (again): the recent ones as they were, with their
    operations, and those before them as a journal.

    As many are recent as can be on their way at once. A consumer that lacks some of these gets exactly them; a new one
    gets everything. So neither sees a crop twice or not at all.

    Args:
        keeps_all: whether the journal is kept; otherwise the recent steps only.
    """

    keeps_all: bool
    recent: tuple[Entry, ...] = ()
    journal: Journal = field(default_factory=Journal)
    kept_from: int = 0  # steps before this one were not kept, or evicted
    _settled: int = 0  # steps before this one are recent no more
    _recent_bytes: int = 0

    @property
    def latest(self) -> Entry | None:
        """The last step."""
        return self.recent[-1] if self.recent else None

    @property
    def nbytes(self) -> int:
        """Bytes of the journal and of the recent steps."""
        return self.journal.nbytes + self._recent_bytes

    @property
    def evictable_bytes(self) -> int:
        """What `evict` would free."""
        return self.nbytes - (self.recent[-1].nbytes if self.recent else 0)

    @property
    def whole(self) -> bool:
        """Could a new consumer be told everything?"""
        return self.kept_from == 0

    def holds(self, step_id: int) -> bool:
        """Is the step one of the recent ones?"""
        return any(entry.step_id == step_id for entry in self.recent)

    def put(self, entry: Entry, keep: int = IN_FLIGHT) -> None:
        """Adds the next step; the last `keep` ones are recent."""
        recent = (*self.recent, entry)
        self._recent_bytes += entry.nbytes
        self.recent, older = recent[-keep:], recent[:-keep]
        for before in older:
            self._recent_bytes -= before.nbytes
            self._settled = before.step_id + 1
            if self.keeps_all and self.whole:
                self.journal.append(before)
            else:
                self.kept_from = self._settled

    def take_back(self, step_id: int) -> None:
        """The steps from `step_id` on, all of them recent, were given up: they never happened."""
        self.recent = tuple(entry for entry in self.recent if entry.step_id < step_id)
        self._recent_bytes = sum(entry.nbytes for entry in self.recent)

    def evict(self) -> None:
        """Forgets all but the latest step."""
        if not self.journal.entries and len(self.recent) < 2:
            return
        forgotten, self.recent = self.recent[:-1], self.recent[-1:]
        self._settled = forgotten[-1].step_id + 1 if forgotten else self._settled
        self._recent_bytes = sum(entry.nbytes for entry in self.recent)
        self.kept_from = self._settled
        self.journal.clear()

    def recall(self, first_step: int) -> list[Entry]:
        """The steps from `first_step` on, one by one; what was cropped since is not among them.

        Raises:
            SessionLost: they are no longer kept.
        """
        if first_step < self.kept_from:
            raise SessionLost(f"the steps before {self.kept_from} are no longer kept")
        return [entry for entry in (*self.journal.entries, *self.recent) if entry.step_id >= first_step]

    def since(self, next_step: int, max_tokens: int = REPLAY_TOKENS) -> list[Entry]:
        """The steps that a consumer lacks which expects `next_step`: 0, or a recent one, or the one to come.

        Raises:
            SessionLost: they are no longer kept, or only joined to others.
        """
        if next_step < self.kept_from:
            raise SessionLost(f"the steps before {self.kept_from} are no longer kept")
        if 0 < next_step < self._settled:
            raise SessionLost(f"the steps before {self._settled} are no longer kept one by one")
        told = [] if next_step else list(self.journal.batches(max_tokens))
        return told + [entry for entry in self.recent if entry.step_id >= next_step]


def joined(entries: Iterable[Entry]) -> Entry:
    """Entries of neighbouring steps, in order, as the one step that they were sent as."""
    return reduce(_join, entries)


def _joinable(first: Entry, second: Entry, max_tokens: int) -> bool:
    return (
        not second.ops
        and first.rows == second.rows
        and first.rows * (first.tokens + second.tokens) <= max_tokens
        and len(first.parts) + len(second.parts) <= MAX_TENSORS
        and _names(first) == _names(second)
        and _grows(first, second)
    )


def _grows(first: Entry, second: Entry) -> bool:
    """Is the earlier step's attention mask, row by row, the beginning of the later one's, which alone is kept? Where it
    is not, the earlier step was computed under a mask that the joined one would not have."""
    earlier, later = _masks(first), _masks(second)
    if not earlier and not later:
        return True
    if len(earlier) != 1 or len(later) != 1:
        return False
    one, other = earlier[0].spec, later[0].spec
    if (one.codec, other.codec) != ("none", "none") or one.dtype != other.dtype:
        return False  # bytes that are not the same value after value
    if len(one.shape) != 2 or len(other.shape) != 2:
        return False
    count = one.keep or one.shape[token_axis(ATTENTION_MASK)]
    before = _columns(earlier[0], count)
    return before is not None and before == _columns(later[0], count)


def _masks(entry: Entry) -> list[Part]:
    return [part for part in entry.parts if part.spec.name == ATTENTION_MASK]


def _columns(mask: Part, count: int) -> list[bytes] | None:
    """The first columns of each row of a mask [rows, tokens]; None: it has fewer, or no bytes of that shape."""
    spec = mask.spec
    rows, width = spec.shape
    if not rows or not width or count > (spec.keep or width) or len(mask.payload) % (rows * width):
        return None
    row, kept = len(mask.payload) // rows, len(mask.payload) // (rows * width) * count
    return [bytes(mask.payload[start : start + kept]) for start in range(0, rows * row, row)]


def _names(entry: Entry) -> set[str]:
    return {part.spec.name for part in entry.parts}


def _join(first: Entry, second: Entry) -> Entry:
    """Both as one step: the parts of both, but only the later attention mask, which covers all tokens."""
    parts = tuple(part for part in first.parts if part.spec.name != ATTENTION_MASK)
    return replace(
        first, tokens=first.tokens + second.tokens, parts=parts + second.parts, step_id=second.step_id, trace=()
    )
