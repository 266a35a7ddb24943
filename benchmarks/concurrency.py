"""1 to 16 clients at once, each a process with its own head: all their tokens per second, and how long each waits."""

from __future__ import annotations

from benchmarks import petals
from benchmarks.arena import CROWD, Arena, Subject, arena, prompt, spans, together
from benchmarks.loads import Load, Loads, table
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result
from peer.loading import multiplies_bfloat16

PROMPT_TOKENS = 8
AT = 8  # clients, for which the bars are
OVER_ONE = {"float32": 2.8, "bfloat16": 3.0}
UNSPLIT = "unsplit"
OVER_PETALS = {"float32": 2.8, "bfloat16": 5.0}

NOTES = """\
`{model}`, greedy, prompts of {prompt} tokens, {new} new ones, all asked for in the same moment; the clients share
the cores with the peers, and each computes its own head. *Total* is all tokens over the time from the first question
to the last token. Peers compute in the number format that is named; heads in float32, in bfloat16 with peers in
bfloat16, which is measured only where the CPU has instructions for it. Petals with 8 clients had {petals:.2f} times
one unsplit stream in float32.
"""


def setting(model: str, peers: int, dtype: str, numbers: tuple[int, ...], new: int, repeats: int) -> Loads:
    """Measures one swarm; in each round every number of clients has a turn, and the unsplit model."""
    folder, name = str(folder_of(model)), f"{peers} peer{'s' if peers > 1 else ''}, {dtype}"
    found = Loads(name, {UNSPLIT: []}, {n: Load() for n in numbers})
    with arena(CROWD) as place:
        unsplit = place.unsplit(folder)
        clients = _swarm(place, folder, model, peers, dtype, max(numbers))
        unsplit.generate(prompt(PROMPT_TOKENS), 8)
        prompts = [prompt(PROMPT_TOKENS, seed) for seed in range(len(clients))]
        together(clients, prompts, 2)
        for _ in range(repeats):
            found.alone[UNSPLIT].append(unsplit.generate(prompts[0], new))
            for n in numbers:
                found.loads[n].rounds.append(together(clients[:n], prompts[:n], new))
    return found


def _swarm(place: Arena, folder: str, model: str, peers: int, dtype: str, number: int) -> list[Subject]:
    place.peers(folder, spans(SHAPES[model].layers, peers), "--dtype", dtype)
    clients = place.clients(number)
    place.joined(clients, folder, peers, dtype=dtype)
    return clients


def bars_of(found: Loads, peers: int, dtype: str) -> list[Bar]:
    """For 1 peer: the gain by many clients, against one and against Petals. For more: that 16 do not collapse."""
    bars = []
    if peers == 1 and AT in found.loads:
        theirs = petals.CLIENTS_TOKENS_PER_S[AT] / petals.UNSPLIT_TOKENS_PER_S
        bars = [
            Bar(f"{AT} clients over 1, {found.name}", found.total(AT) / found.total(1), "at least", OVER_ONE[dtype]),
            Bar(
                f"{AT} clients, {found.name}, over Petals'",
                found.over(AT, UNSPLIT) / theirs,
                "at least",
                OVER_PETALS[dtype],
            ),
        ]
    if peers > 1 and 2 * AT in found.loads:
        bars = [Bar(f"16 clients over 8, {found.name}", found.total(2 * AT) / found.total(AT), "at least", 1.0)]
    return bars


def measure(quick: bool) -> Result:
    """See the module."""
    model, new, repeats = ("llama-tiny", 8, 2) if quick else ("llama-small", 32, 2)
    numbers = (1, 2) if quick else (1, 2, 4, 8, 16)
    wanted = [(1, "float32")] if quick else [(1, "float32"), (2, "float32")]
    if not quick and multiplies_bfloat16():
        wanted.append((1, "bfloat16"))
    found = {each: setting(model, *each, numbers, new, repeats) for each in wanted}
    theirs = {n: [rate / petals.UNSPLIT_TOKENS_PER_S] for n, rate in petals.CLIENTS_TOKENS_PER_S.items()}
    plot = Plot(
        "all clients' tokens/s",
        "clients",
        "over one unsplit stream",
        [*(each.curve(UNSPLIT) for each in found.values()), Curve.of("Petals, 1 server", theirs)],
        log_x=True,
    )
    notes = NOTES.format(model=model, prompt=PROMPT_TOKENS, new=new, petals=theirs[AT][0])
    raw = {each.name: {str(n): load.totals for n, load in each.loads.items()} for each in found.values()}
    bars = [bar for (peers, dtype), each in found.items() for bar in bars_of(each, peers, dtype)]
    return Result(
        "concurrency", "Many clients", notes, bars, [table(list(found.values()), "swarm", "client")], [plot], raw
    )
