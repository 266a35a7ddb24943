"""How many threads peers and the unsplit model compute with, and whether OpenMP's threads spin between operations."""

from __future__ import annotations

from benchmarks.arena import Tuning, arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Result, Table

NOTES = """\
`{model}`: milliseconds per token of a short prompt, and the first token of a prompt of {long}, over 2 peers and
unsplit. The other scenarios use what `TUNING` in `benchmarks/arena.py` says.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, long, new = ("llama-tiny", 64, 8) if quick else ("llama-small", 512, 24)
    folder, rows = str(folder_of(model)), []
    for threads in (1, 2):
        for passive in (True, False):
            with arena(Tuning(threads, threads, 1, passive, passive, passive)) as place:
                unsplit = place.unsplit(folder)
                place.peers(folder, spans(SHAPES[model].layers, 2))
                client = place.client(folder, 2)
                cells = []
                for subject in (unsplit, client):
                    subject.generate(prompt(8), 8)
                    cells.append(f"{subject.generate(prompt(8), new).ms_per_token:.1f}")
                    firsts_s = [subject.generate(prompt(long, seed), 1).first_s for seed in range(2)]
                    cells.append(f"{min(firsts_s):.2f}")
            rows.append((str(threads), "sleep" if passive else "spin", *cells))
    head = ("threads", "between operations", "unsplit, ms per token", "first, s", "2 peers, ms per token", "first, s")
    return Result("threads", "Threads", NOTES.format(model=model, long=long), tables=[Table(head, rows)])
