"""Steps of a session as entries of journals, and a cache for them: one byte per token."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from protocol.journal import Entry, Part
from protocol.messages import HIDDEN, CacheOp, TensorSpec, token_axis


def stepped(step_id: int, position: int, payload: bytes, *ops: CacheOp, tokens: int = 1) -> Entry:
    """What a step brings, of this payload: float32 [1, tokens, 4]."""
    spec = TensorSpec(HIDDEN, "none", "float32", (1, tokens, 4), len(payload))
    return Entry(position, tokens, 1, (Part(spec, payload),), ops, step_id)


@dataclass
class FakeCache:
    """Rows of token values; the peer's cache as far as a journal is concerned."""

    rows: list[list[int]] = field(default_factory=list)

    def apply(self, entry: Entry) -> None:
        for op in entry.ops:
            match op.kind:
                case "crop":
                    self.rows = [row[: op.values[0]] for row in self.rows]
                case "reorder" | "select":
                    self.rows = [list(self.rows[i]) for i in op.values]
                case "repeat":
                    self.rows = [list(row) for row in self.rows for _ in range(op.values[0])]
                case "reset":
                    self.rows = []
        tokens = hidden(entry)
        if not self.rows:
            self.rows = [[] for _ in tokens]
        assert len(tokens) == len(self.rows)
        for row, new in zip(self.rows, tokens, strict=True):
            row.extend(new)


def part(values: list[list[int]], name: str = HIDDEN) -> Part:
    """One byte per token; hidden states are [rows, tokens, 1]."""
    payload = bytes(v for row in values for v in row)
    shape = (len(values), len(values[0]), 1) if name == HIDDEN else (len(values), len(values[0]))
    return Part(TensorSpec(name, "none", "uint8", shape, len(payload)), payload)


def hidden(entry: Entry) -> list[list[int]]:
    """What a peer makes of the entry's parts: kept tokens, joined."""
    rows: list[list[int]] = [[] for _ in range(entry.rows)]
    for p in entry.parts:
        if p.spec.name != HIDDEN:
            continue
        width = p.spec.shape[token_axis(HIDDEN)]
        for i, row in enumerate(rows):
            values = list(p.payload[i * width : (i + 1) * width])
            row.extend(values[: p.spec.keep] if p.spec.keep else values)
    assert all(len(row) == entry.tokens for row in rows)
    return rows


@st.composite
def steps(draw: st.DrawFn, max_steps: int = 12) -> list[Entry]:
    """The steps of a session, in order, with whatever generation does to caches in between."""
    rows, position, counter = draw(st.integers(1, 3)), 0, 0
    entries: list[Entry] = []
    for _ in range(draw(st.integers(1, max_steps))):
        ops: list[CacheOp] = []
        if entries:
            for kind in draw(st.lists(st.sampled_from(["crop", "reorder", "select", "repeat", "reset"]), max_size=2)):
                match kind:
                    case "crop":
                        position = draw(st.integers(0, position))
                        ops.append(CacheOp("crop", (position,)))
                    case "reorder":
                        ops.append(CacheOp("reorder", tuple(draw(st.permutations(range(rows))))))
                    case "select":
                        chosen = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
                        ops.append(CacheOp("select", tuple(chosen)))
                        rows = len(chosen)
                    case "repeat":
                        times = draw(st.integers(1, 2))
                        ops.append(CacheOp("repeat", (times,)))
                        rows *= times
                    case "reset":
                        position = 0
                        ops.append(CacheOp("reset"))
                        break  # there are no rows to move any more
        tokens = draw(st.integers(1, 5))
        values = [[(counter + 31 * r + t) % 256 for t in range(tokens)] for r in range(rows)]
        counter += tokens
        entries.append(Entry(position, tokens, rows, (part(values),), tuple(ops), step_id=len(entries)))
        position += tokens
    return entries
