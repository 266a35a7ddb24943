"""A long prompt over 1 to 4 devices that are emulated by waiting, so that they really overlap."""

from __future__ import annotations

from benchmarks.arena import arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Spread

MODEL = "llama-waits"
TOKENS = 512
MS_PER_TOKEN = 0.5  # and block: 2 s for the prompt over all eight blocks
BAR = 1.15
CHUNKS: dict[str, int] = {}
"""Settings of `ClientConfig` that choose chunks; none: what a user gets."""

NOTES = """\
{tokens} tokens through 8 blocks, each of which waits {ms} ms per token instead of computing, over S peers. With C
chunks S devices can at best need (S + C - 1)/(S x C) of one device's time; the bar is {bar} times that. C is what
the client chose, but no less than S: who cuts less is held against that.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    stages, tokens, repeats = ((1, 2), 64, 1) if quick else ((1, 2, 3, 4), TOKENS, 3)
    folder = str(folder_of(MODEL))
    seconds: dict[int, list[float]] = {}
    chunks: dict[int, int] = {}
    for n in stages:
        with arena() as place:
            command = ("benchmarks.emulated", str(MS_PER_TOKEN))
            place.peers(folder, spans(SHAPES[MODEL].layers, n), command=command)
            client = place.client(folder, n, **CHUNKS)
            client.generate(prompt(tokens, 99), 2)  # after it the client knows how long steps take
            answers = [client.generate(prompt(tokens, seed), 1) for seed in range(repeats)]
            seconds[n] = [answer.first_s for answer in answers]
            chunks[n] = max(answer.steps for answer in answers)
    one_s = Spread.of(seconds[1]).median
    cut = {n: max(n, chunks[n]) for n in stages}
    best = {n: (n + cut[n] - 1) / (n * cut[n]) for n in stages}
    shares = {n: [value / one_s for value in values] for n, values in seconds.items()}
    over = {n: Spread.of(shares[n]).median / best[n] for n in stages}
    bars = [Bar(f"{n} devices, over (S + C - 1)/(S x C)", over[n], "at most", BAR) for n in stages if n > 1]
    rows = [
        (
            str(n),
            str(chunks[n]),
            Spread.of(seconds[n]).show(),
            Spread.of(shares[n]).show(),
            f"{best[n]:.2f}",
            f"{over[n]:.2f}",
        )
        for n in stages
    ]
    table = Table(("devices S", "chunks C", "first token, s", "of one device's", "best", "over best"), rows)
    curves = [Curve.of("measured", shares), Curve.of("best for its chunks", {n: [value] for n, value in best.items()})]
    plot = Plot("first token of a long prompt", "devices", "of one device's time", curves)
    notes = NOTES.format(tokens=tokens, ms=MS_PER_TOKEN, bar=BAR)
    return Result(
        "pipeline", "A long prompt over several devices", notes, bars, [table], [plot], {"s": seconds, "chunks": chunks}
    )
