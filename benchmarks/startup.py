"""From a peer's command to the first token that it serves; and how long `potluck --help` takes."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks import petals
from benchmarks.arena import arena, prompt
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Spread

START_BAR_S = 6.0
HELP_BAR_S = 0.5

NOTES = """\
`{model}` from local files, all blocks, joining a swarm that is there. A client that has loaded its head already asks
for one token as soon as the peer says that it serves; the time runs from the peer's command to that token. Petals:
{petals} s.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, repeats = ("llama-tiny", 1) if quick else ("llama-small", 3)
    folder = str(folder_of(model))
    serves_s, first_s, help_s = [], [], []
    for seed in range(repeats):
        started_s = time.monotonic()
        subprocess.run([sys.executable, "-m", "potluck", "--help"], check=True, capture_output=True)
        help_s.append(time.monotonic() - started_s)
        with arena() as place:
            place.bootstrap()
            client = place.client(folder, 0)
            peer = place.start_peer(folder, f"0:{SHAPES[model].layers}").ready()
            serves_s.append(time.monotonic() - peer.started_s)
            first_s.append(client.generate(prompt(8, seed), 1).ended_s - peer.started_s)
    bars = [
        Bar("peer's command to its first served token", Spread.of(first_s).median, "at most", START_BAR_S, "s"),
        Bar("potluck --help", Spread.of(help_s).median, "at most", HELP_BAR_S, "s"),
    ]
    rows = [
        ("the peer serves", Spread.of(serves_s).show()),
        ("its first served token", Spread.of(first_s).show()),
        ("potluck --help", Spread.of(help_s).show()),
    ]
    notes = NOTES.format(model=model, petals=petals.START_S)
    raw = {"serves_s": serves_s, "first_s": first_s, "help_s": help_s}
    return Result("startup", "Start", notes, bars, [Table(("", "s"), rows)], raw=raw)
