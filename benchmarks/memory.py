"""Memory and processes of a peer, over its weights and the KV cache that it declared."""

from __future__ import annotations

import time

from benchmarks import petals
from benchmarks.arena import Peer, arena, prompt
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Result, Table

BAR_MIB = 400.0
MOST_PROCESSES = 2.0
KV_TOKENS = 2048
MIB = 2**20
SETTLED_S = 6.0  # a peer looks every 5 s whether there is memory to give back

NOTES = """\
`{model}`, all blocks, float32, `--kv-tokens {kv}`: PSS and USS of all the peer's processes, at its start, and after
prompts of {tokens} tokens and {new} tokens of answers, {settled:.0f} s later. *Over* is PSS less the weights;
in the last line less the declared KV cache, too, which the prompt nearly fills. Other budgets (messages, journals) are
not subtracted. Petals: {petals} MiB unshared at the start, {processes} processes.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, tokens, new = ("llama-tiny", 512, 8) if quick else ("llama-small", 1900, 96)
    shape, folder = SHAPES[model], str(folder_of(model))
    with arena() as place:
        (peer,) = place.peers(folder, [f"0:{shape.layers}"], "--kv-tokens", str(KV_TOKENS))
        at_start = _mib(peer, "pss"), _mib(peer, "uss")
        client = place.client(folder, 1)
        for seed in range(2):
            client.generate(prompt(tokens, seed), new)
        time.sleep(SETTLED_S)
        after = _mib(peer, "pss"), _mib(peer, "uss")
        names = [process.name() for process in peer.family()]
    weights = _weights_mib(shape.hidden, shape.intermediate, shape.layers)
    kv = KV_TOKENS * shape.layers * 2 * shape.hidden * 4 / MIB
    others = sum(name != "p2pd" for name in names)
    bars = [
        Bar("peer at its start, over weights", at_start[0] - weights, "at most", BAR_MIB, "MiB"),
        Bar("peer after long prompts, over weights and KV", after[0] - weights - kv, "at most", BAR_MIB, "MiB"),
        Bar("processes besides p2pd", others, "at most", MOST_PROCESSES, "of them"),
    ]
    rows = [
        ("start", *(f"{value:.0f}" for value in (*at_start, at_start[0] - weights))),
        ("after long prompts", *(f"{value:.0f}" for value in (*after, after[0] - weights - kv))),
    ]
    notes = NOTES.format(
        model=model,
        kv=KV_TOKENS,
        tokens=tokens,
        new=new,
        settled=SETTLED_S,
        petals=petals.UNSHARED_MIB,
        processes=petals.PROCESSES,
    )
    raw = {"weights_mib": weights, "kv_mib": kv, "processes": names}
    table = Table(("", "PSS, MiB", "USS, MiB", "over, MiB"), rows, f"weights {weights:.0f} MiB, KV {kv:.0f} MiB")
    return Result("memory", "Memory", notes, bars, [table], raw=raw)


def _mib(peer: Peer, kind: str) -> float:
    return sum(float(getattr(process.memory_full_info(), kind)) for process in peer.family()) / MIB


def _weights_mib(hidden: int, intermediate: int, layers: int) -> float:
    """Of the blocks, float32: four attention matrices, three of the MLP, two norms."""
    return layers * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden) * 4 / MIB
