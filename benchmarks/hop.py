"""What a hop costs: the time per token of a tiny model over 1 to 8 peers; the slope is the cost of one of them."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import petals
from benchmarks.arena import TUNING, arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Answer, Spread, slope

MODEL = "llama-tiny"
BAR_MS = 1.0
OF_PETALS = 1 / 5
PROMPT_TOKENS = 8
MANY = replace(TUNING, peer_threads=1)
"""More peers than cores: threads that spin in one would take the time of the next."""

NOTES = """\
`llama-tiny`, greedy, a prompt of 8 tokens, {new} new ones; TLS on, loopback, one thread per peer. The line through the
medians over 1 to {most} hops rises by the cost of a hop: what is computed is the same, however it is cut. A model's
own overhead per pass (masks, positions, the first and last of its layers' code) is part of that cost.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    hops, new, repeats = ((1, 2), 16, 2) if quick else ((1, 2, 4, 8), 64, 5)
    folder = str(folder_of(MODEL))
    answers: dict[int, list[Answer]] = {0: []} | {n: [] for n in hops}
    for n in hops:
        with arena(MANY) as place:
            unsplit = place.unsplit(folder)
            place.peers(folder, spans(SHAPES[MODEL].layers, n))
            client = place.client(folder, n)
            for subject in (unsplit, client):
                subject.generate(prompt(PROMPT_TOKENS), 16)
            for seed in range(repeats):
                answers[0].append(unsplit.generate(prompt(PROMPT_TOKENS, seed), new))
                answers[n].append(client.generate(prompt(PROMPT_TOKENS, seed), new))
    times_ms = {n: [answer.ms_per_token for answer in found] for n, found in answers.items()}
    middle = {n: Spread.of(values).median for n, values in times_ms.items()}
    cost_ms = slope(hops, [middle[n] for n in hops])
    theirs_ms = slope(hops, [petals.HOP_MS[n] for n in hops])
    # Through the unsplit model's time: their machine was another one.
    share = (cost_ms / middle[0]) / (theirs_ms / petals.HOP_MS[0])
    rows = [
        (str(n) if n else "unsplit", Spread.of(values).show(), f"{petals.HOP_MS[n]:.1f}")
        for n, values in times_ms.items()
    ]
    plot = Plot(
        "llama-tiny",
        "hops",
        "ms per token",
        [
            Curve.of("Potluck", {n: times_ms[n] for n in hops}),
            Curve.of("Petals", {n: [petals.HOP_MS[n]] for n in hops}),
        ],
    )
    bars = [
        Bar("per hop and token", cost_ms, "at most", BAR_MS, "ms"),
        Bar("per hop, over unsplit time, of Petals'", share, "at most", OF_PETALS),
    ]
    table = Table(("hops", "ms per token", "Petals"), rows)
    return Result("hop", "Cost of a hop", NOTES.format(new=new, most=hops[-1]), bars, [table], [plot], {"ms": times_ms})
