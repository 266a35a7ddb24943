"""One stream: an answer over 1, 2 and 4 peers, in turns with the unsplit model."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import petals
from benchmarks.arena import arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Answer, Spread, ratios

BARS = {1: 0.95, 2: 0.92, 4: 0.85}
OVER_PETALS = {1: 1.2, 2: 1.3, 4: 1.4}
BEST_OVER_PETALS = 3.0
PROMPT_TOKENS = 8
BEST: tuple[str, ...] = ("--quantization", "int8")
"""A peer's flags for the best speed of a CPU."""
BEST_CLIENT = {"dtype": "bfloat16"}
"""And a client's settings."""

NOTES = """\
`{model}`, greedy, a prompt of {prompt} tokens, {new} new ones; tokens per second with the first token included, over
those of the unsplit model a moment before. `best` is one peer with `{best}`, and a head in bfloat16; what that costs
in right answers is said on the page on [accuracy](accuracy.md).
"""


@dataclass(frozen=True, slots=True)
class Turns:
    """Answers of the unsplit model and of the swarm, in turns."""

    unsplit: list[Answer]
    swarm: list[Answer]

    @property
    def ratios(self) -> list[float]:
        return ratios([a.tokens_per_s for a in self.swarm], [a.tokens_per_s for a in self.unsplit])


def turns(model: str, peers: int, new: int, repeats: int, *options: str, **settings: str) -> Turns:
    """The unsplit model and a swarm of so many peers, which have these options; settings: the client's."""
    folder, found = str(folder_of(model)), Turns([], [])
    with arena() as place:
        unsplit = place.unsplit(folder)
        place.peers(folder, spans(SHAPES[model].layers, peers), *options)
        client = place.client(folder, peers, **settings)
        for subject in (unsplit, client):
            subject.generate(prompt(PROMPT_TOKENS), 8)
        for seed in range(repeats):
            ids = prompt(PROMPT_TOKENS, seed)
            found.unsplit.append(unsplit.generate(ids, new))
            found.swarm.append(client.generate(ids, new))
    return found


def has_quantization() -> bool:
    """Can this checkout's peers do what `BEST` asks of them?"""
    from dataclasses import fields

    from peer.config import PeerConfig

    return "quantization" in {field.name for field in fields(PeerConfig)}


def measure(quick: bool) -> Result:
    """See the module."""
    model, new, repeats = ("llama-tiny", 8, 2) if quick else ("llama-small", 128, 3)
    found = {str(n): turns(model, n, new, repeats) for n in ((1, 2) if quick else BARS)}
    if has_quantization():
        found["best"] = turns(model, 1, new, repeats, *BEST, **BEST_CLIENT)
    shares = {name: Spread.of(each.ratios) for name, each in found.items()}
    bars = []
    for n in BARS:
        if str(n) in shares:
            share = shares[str(n)].median
            name = f"{n} peer{'s' if n > 1 else ''}"
            bars.append(Bar(f"{name}, over unsplit", share, "at least", BARS[n]))
            bars.append(Bar(f"{name}, over Petals", share / petals.SINGLE[n], "at least", OVER_PETALS[n]))
    if "best" in shares:
        bars.append(
            Bar("best settings, over Petals", shares["best"].median / petals.SINGLE[1], "at least", BEST_OVER_PETALS)
        )
    rows = [
        (
            name,
            Spread.of(a.tokens_per_s for a in each.unsplit).show(".1f"),
            Spread.of(a.tokens_per_s for a in each.swarm).show(".1f"),
            Spread.of(a.ms_per_token for a in each.swarm).show(".1f"),
            shares[name].show(),
            f"{petals.SINGLE[int(name)]:.2f}" if name.isdigit() else "",
        )
        for name, each in found.items()
    ]
    plot = Plot(
        "tokens/s over the unsplit model's",
        "peers",
        "ratio",
        [
            Curve.of("Potluck", {int(name): each.ratios for name, each in found.items() if name.isdigit()}),
            Curve.of("Petals", {n: [share] for n, share in petals.SINGLE.items()}),
        ],
    )
    return Result(
        "single",
        "One stream",
        NOTES.format(model=model, prompt=PROMPT_TOKENS, new=new, best=" ".join(BEST)),
        bars,
        [Table(("peers", "unsplit tok/s", "tok/s", "ms per token", "ratio", "Petals"), rows)],
        [plot],
        {name: {"ratios": each.ratios} for name, each in found.items()},
    )
