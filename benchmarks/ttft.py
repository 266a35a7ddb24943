"""Time to the first token of prompts of 64 to 2,048 tokens, over 1 and 4 peers, in turns with the unsplit model."""

from __future__ import annotations

from benchmarks import petals
from benchmarks.arena import arena, prompt, shared_by, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Spread, ratios

BAR = 1.1
BAR_TOKENS = 512
BAR_PEERS = 4

NOTES = """\
`{model}`, float32: time to the first token, over that of the unsplit model a moment before. Petals had {p1:.2f} over
1 peer and {p4:.2f} over 4 with 512 tokens. The peers share the machine's cores, so that they cannot be faster
together than one: what several devices gain is in *A long prompt over several devices*.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, sizes, repeats = ("llama-tiny", (64, 128), 2) if quick else ("llama-small", (64, 256, 512, 1024, 2047), 3)
    folder = str(folder_of(model))
    found: dict[int, dict[int, list[float]]] = {}
    seconds: dict[int, dict[int, list[float]]] = {0: {n: [] for n in sizes}}
    for peers in (1, BAR_PEERS):
        found[peers], seconds[peers] = {}, {}
        with arena(shared_by(peers)) as place:
            unsplit = place.unsplit(folder)
            place.peers(folder, spans(SHAPES[model].layers, peers))
            client = place.client(folder, peers)
            for subject in (unsplit, client):
                subject.generate(prompt(64), 2)
            for tokens in sizes:
                theirs, ours = [], []
                for seed in range(repeats):
                    theirs.append(unsplit.generate(prompt(tokens, seed), 1).first_s)
                    ours.append(client.generate(prompt(tokens, seed), 1).first_s)
                found[peers][tokens] = ratios(ours, theirs)
                seconds[peers][tokens] = ours
                seconds[0][tokens] += theirs
    bars = []
    if BAR_TOKENS in sizes:
        share = Spread.of(found[BAR_PEERS][BAR_TOKENS]).median
        bars = [Bar(f"{BAR_TOKENS} tokens, {BAR_PEERS} peers, over unsplit", share, "at most", BAR)]
    rows = [
        (
            f"{n:,}",
            Spread.of(seconds[0][n]).show(),
            *(text for p in found for text in (Spread.of(seconds[p][n]).show(), Spread.of(found[p][n]).show())),
        )
        for n in sizes
    ]
    head = ("prompt", "unsplit, s", *(text for p in found for text in (f"{p} peers, s", "ratio")))
    curves = [Curve.of(f"{p} peers" if p else "unsplit", seconds[p]) for p in seconds]
    plots = [
        Plot("time to the first token", "tokens of the prompt", "s", curves, log_x=True),
        Plot("over unsplit", "tokens", "ratio", [Curve.of(f"{p} peers", found[p]) for p in found], log_x=True),
    ]
    notes = NOTES.format(model=model, p1=petals.FIRST_TOKEN[1], p4=petals.FIRST_TOKEN[4])
    return Result("ttft", "The first token", notes, bars, [Table(head, rows)], plots, {"s": seconds})
