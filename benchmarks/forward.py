"""Forward passes of a batch without a cache, over 1 and 4 peers, in turns with the unsplit model."""

from __future__ import annotations

from benchmarks import petals
from benchmarks.arena import arena, shared_by, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Spread, ratios

ROWS, TOKENS = 8, 128
BAR = 0.95

NOTES = """\
`{model}`, float32, {rows} x {tokens} tokens: tokens per second over those of the unsplit model a moment before. The
client's head has {rows} x {tokens} tokens to score here.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, repeats = ("llama-tiny", 1) if quick else ("llama-small", 4)
    folder = str(folder_of(model))
    bars, rows, raw = [], [], {}
    for peers, theirs in petals.FORWARD.items():
        took_s: dict[str, list[float]] = {"unsplit": [], "swarm": []}
        with arena(shared_by(peers)) as place:
            subjects = {"unsplit": place.unsplit(folder)}
            place.peers(folder, spans(SHAPES[model].layers, peers))
            subjects["swarm"] = place.client(folder, peers)
            for _ in range(1 + repeats):
                for name, subject in subjects.items():
                    took_s[name].append(subject.do("forward", rows=ROWS, tokens=TOKENS)["took_s"])
        rates = {name: [ROWS * TOKENS / seconds for seconds in each[1:]] for name, each in took_s.items()}
        raw[str(peers)] = ratios(rates["swarm"], rates["unsplit"])
        share = Spread.of(raw[str(peers)])
        bars.append(Bar(f"{peers} peers, over unsplit", share.median, "at least", BAR))
        shown = [Spread.of(each).show(".0f") for each in rates.values()]
        rows.append((str(peers), *shown, share.show(), f"{theirs:.2f}"))
    table = Table(("peers", "unsplit tok/s", "tok/s", "ratio", "Petals"), rows)
    notes = NOTES.format(model=model, rows=ROWS, tokens=TOKENS)
    return Result("forward", "Forward passes", notes, bars, [table], raw=raw)
