"""1 to 16 clients at once, each a process with its own head: all their tokens per second, and how long each waits."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks import petals
from benchmarks.arena import CROWD, Arena, Subject, arena, prompt, spans, together
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Answer, Spread, p99, total_tokens_per_s
from peer.loading import multiplies_bfloat16

PROMPT_TOKENS = 8
AT = 8  # clients, for which the bars are
OVER_ONE = {"float32": 2.8, "bfloat16": 3.0}
OVER_PETALS = {"float32": 2.8, "bfloat16": 5.0}

NOTES = """\
`{model}`, greedy, prompts of {prompt} tokens, {new} new ones, all asked for in the same moment; the clients share
the cores with the peers, and each computes its own head. *Total* is all tokens over the time from the first question
to the last token. Peers compute in the number format that is named; heads in float32, in bfloat16 with peers in
bfloat16, which is measured only where the CPU has instructions for it. Petals with 8 clients had {petals:.2f} times
one unsplit stream in float32.
"""


@dataclass(slots=True)
class Load:
    """Rounds of so many clients at once; `alone` are streams of the unsplit model between them."""

    rounds: list[list[Answer]] = field(default_factory=list)

    @property
    def totals(self) -> list[float]:
        return [total_tokens_per_s(answers) for answers in self.rounds]

    @property
    def worst_first_s(self) -> list[float]:
        return [max(answer.first_s for answer in answers) for answers in self.rounds]

    @property
    def p99_ms(self) -> float:
        """Of all times between two tokens of a client."""
        return 1e3 * p99([gap for answers in self.rounds for answer in answers for gap in answer.gaps_s])


@dataclass(slots=True)
class Setting:
    """A swarm under rising load."""

    peers: int
    dtype: str
    unsplit: list[Answer] = field(default_factory=list)
    loads: dict[int, Load] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.peers} peer{'s' if self.peers > 1 else ''}, {self.dtype}"

    def total(self, clients: int) -> float:
        return Spread.of(self.loads[clients].totals).median

    @property
    def unsplit_tokens_per_s(self) -> float:
        return Spread.of(answer.tokens_per_s for answer in self.unsplit).median


def setting(model: str, peers: int, dtype: str, numbers: tuple[int, ...], new: int, repeats: int) -> Setting:
    """Measures one swarm; in each round every number of clients has a turn, and the unsplit model."""
    folder, found = str(folder_of(model)), Setting(peers, dtype, loads={n: Load() for n in numbers})
    with arena(CROWD) as place:
        unsplit = place.unsplit(folder)
        clients = _swarm(place, folder, model, peers, dtype, max(numbers))
        unsplit.generate(prompt(PROMPT_TOKENS), 8)
        prompts = [prompt(PROMPT_TOKENS, seed) for seed in range(len(clients))]
        together(clients, prompts, 2)
        for _ in range(repeats):
            found.unsplit.append(unsplit.generate(prompts[0], new))
            for n in numbers:
                found.loads[n].rounds.append(together(clients[:n], prompts[:n], new))
    return found


def _swarm(place: Arena, folder: str, model: str, peers: int, dtype: str, number: int) -> list[Subject]:
    place.peers(folder, spans(SHAPES[model].layers, peers), "--dtype", dtype)
    clients = place.clients(number)
    place.joined(clients, folder, peers, dtype=dtype)
    return clients


def bars_of(found: Setting) -> list[Bar]:
    """For 1 peer: the gain by many clients, against one and against Petals. For more: that 16 do not collapse."""
    bars = []
    if found.peers == 1 and AT in found.loads:
        total, dtype = found.total(AT), found.dtype
        theirs = petals.CLIENTS_TOKENS_PER_S[AT] / petals.UNSPLIT_TOKENS_PER_S
        bars = [
            Bar(f"{AT} clients over 1, {found.name}", total / found.total(1), "at least", OVER_ONE[dtype]),
            Bar(
                f"{AT} clients, {found.name}, over Petals'",
                total / found.unsplit_tokens_per_s / theirs,
                "at least",
                OVER_PETALS[dtype],
            ),
        ]
    if found.peers > 1 and 2 * AT in found.loads:
        bars = [Bar(f"16 clients over 8, {found.name}", found.total(2 * AT) / found.total(AT), "at least", 1.0)]
    return bars


def measure(quick: bool) -> Result:
    """See the module."""
    model, new, repeats = ("llama-tiny", 8, 2) if quick else ("llama-small", 32, 2)
    numbers = (1, 2) if quick else (1, 2, 4, 8, 16)
    wanted = [(1, "float32")] if quick else [(1, "float32"), (2, "float32")]
    if not quick and multiplies_bfloat16():
        wanted.append((1, "bfloat16"))
    found = [setting(model, peers, dtype, numbers, new, repeats) for peers, dtype in wanted]
    rows = [
        (
            each.name,
            str(n),
            Spread.of(load.totals).show(".1f"),
            f"{each.total(n) / each.total(1):.2f}",
            f"{each.total(n) / each.unsplit_tokens_per_s:.2f}",
            Spread.of(load.worst_first_s).show(),
            f"{load.p99_ms:.0f}",
        )
        for each in found
        for n, load in each.loads.items()
    ]
    head = (
        "swarm",
        "clients",
        "total tok/s",
        "over 1 client",
        "over unsplit",
        "worst first token, s",
        "p99 between tokens, ms",
    )
    curves = [
        Curve.of(e.name, {n: [t / e.unsplit_tokens_per_s for t in load.totals] for n, load in e.loads.items()})
        for e in found
    ]
    theirs = {n: [rate / petals.UNSPLIT_TOKENS_PER_S] for n, rate in petals.CLIENTS_TOKENS_PER_S.items()}
    plot = Plot(
        "all clients' tokens/s",
        "clients",
        "over one unsplit stream",
        [*curves, Curve.of("Petals, 1 server", theirs)],
        log_x=True,
    )
    notes = NOTES.format(model=model, prompt=PROMPT_TOKENS, new=new, petals=theirs[AT][0])
    raw = {each.name: {str(n): load.totals for n, load in each.loads.items()} for each in found}
    bars = [bar for each in found for bar in bars_of(each)]
    return Result("concurrency", "Many clients", notes, bars, [Table(head, rows)], [plot], raw)
