"""Whatever was appended, a replay of the journal leaves a cache as the original steps left it."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from protocol.journal import Entry, Journal, Part
from protocol.messages import ATTENTION_MASK, HIDDEN, CacheOp, TensorSpec, token_axis


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
def steps(draw: st.DrawFn) -> list[Entry]:
    rows, position, entries = draw(st.integers(1, 3)), 0, []
    counter = 0
    for _ in range(draw(st.integers(1, 12))):
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
        entries.append(Entry(position, tokens, rows, (part(values),), tuple(ops)))
        position += tokens
    return entries


@given(steps(), st.integers(1, 40))
def test_a_replay_makes_the_same_cache(entries: list[Entry], max_tokens: int) -> None:
    original, journal = FakeCache(), Journal()
    for entry in entries:
        original.apply(entry)
        journal.append(entry)
    replayed, position = FakeCache(), 0
    for entry in journal.batches(max_tokens):
        assert entry.position == position, "a replay has no gaps"
        replayed.apply(entry)
        position += entry.tokens
    assert replayed.rows == original.rows
    assert journal.nbytes == sum(e.nbytes for e in journal.entries)


def test_neighbours_are_joined_up_to_the_limit() -> None:
    journal = Journal()
    for position in range(10):
        journal.append(Entry(position, 1, 1, (part([[position]]),)))
    assert [e.tokens for e in journal.batches(4)] == [4, 4, 2]


def test_a_cropped_mask_covers_the_past_too() -> None:
    journal = Journal()
    mask = part([[0, 1, 1, 1, 1, 1]], ATTENTION_MASK)
    journal.append(Entry(0, 2, 1, (part([[1, 2]]), part([[0, 1]], ATTENTION_MASK))))
    journal.append(Entry(2, 4, 1, (part([[3, 4, 5, 6]]), mask)))
    journal.append(Entry(3, 1, 1, (part([[7]]), part([[0, 1, 1, 1]], ATTENTION_MASK)), (CacheOp("crop", (3,)),)))
    kept = journal.entries[1]
    assert [p.spec.keep for p in kept.parts] == [1, 3]
    assert [e.tokens for e in journal.batches(100)] == [4], "one replay, with the last mask only"
    joined = next(journal.batches(100))
    assert [p.spec.name for p in joined.parts].count(ATTENTION_MASK) == 1
