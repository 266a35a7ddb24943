"""Liars among peers, against audits: `python -m benchmarks liars`; writes docs/lying-peers.md.

The comparison and the verdict are the client's own, on activations of the demo model that are recorded once per number
format; sessions are drawn from these.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import torch

from benchmarks.liars_lengths import lengths_table
from benchmarks.liars_odds import Habit, Odds, Signs, odds
from benchmarks.liars_page import INTRODUCTION, LENGTHS, TAIL
from benchmarks.liars_pairs import codecs_table, finds, honest_pairs, pairs_table
from benchmarks.liars_verdicts import verdicts
from benchmarks.lies import BFLOAT16, FLOAT32, LIES, WHAT, Recording, record, rows
from client.sample import LEAST, MOST, SEVERAL
from client.tolerance import MARGIN, TYPICAL_MARGIN, Kind, Tolerance, distances
from protocol.identity import Identity
from protocol.messages import HIDDEN, TensorSpec
from protocol.receipts import Line, Receipt, digest
from tensor_codecs import DEFAULT, codec

DOC: Final = Path(__file__).parents[1] / "docs" / "lying-peers.md"
RATES: Final = (0.01, 0.05, 1.0)
CODECS: Final = ("int8", "none", "bf16")
SESSIONS, TOKENS = 12, 200
SHORT, LONG = 200, 2000  # steps of a session
DRAWN, DRAWN_LONG = 200_000, 10_000  # sessions
HOPS, SHARE = 3, 0.1  # hops of a chain; the share of peers that lie
WIDTH = 4096

NOISY: Final = "noise"
FAINT: Final = "faint noise"
SMALLER: Final = "a smaller model's outputs"
COARSE: Final = "nf4 weights"
SELDOM: Final = "wrong on 1 % of steps"
HABITS: Final[dict[str, tuple[str, Kind, Habit]]] = {
    **{lie: (lie, FLOAT32, Habit()) for lie in LIES},
    **{f"{lie}, in bfloat16": (lie, BFLOAT16, Habit()) for lie in (FAINT, SMALLER, COARSE)},
    "nf4 weights from step 50 on, in bfloat16": (COARSE, BFLOAT16, Habit(first=50)),
    "wrong from step 50 on": (NOISY, FLOAT32, Habit(first=50)),
    SELDOM: (NOISY, FLOAT32, Habit(share=0.01)),
    "wrong for one client": (NOISY, FLOAT32, Habit()),
}


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """A liar's outputs against an honest auditor of the kind that it says it is, in one span.

    Attributes:
        apart: distances of the tokens that came one by one, [sessions, tokens].
    """

    apart: torch.Tensor
    within: Tolerance


def told(recordings: list[Recording], lie: str, kind: Kind) -> list[Told]:
    """Span by span."""
    found = []
    for recording, part in rows(recordings):
        pairs = zip(LIES[lie](recording, kind), recording.bulk[kind], strict=True)
        within = Tolerance.between(kind, kind, DEFAULT, len(recording.span))
        found.append(Told(torch.stack([distances(t[part], b[part]) for t, b in pairs]), within))
    return found


def costs() -> str:
    """What digests and receipts cost, in a sentence."""
    hidden = torch.randn(1, 1, WIDTH)
    using = codec("int8")
    payload = using.encode(hidden)
    parts = [(TensorSpec(HIDDEN, "int8", "float32", tuple(hidden.shape), len(payload)), payload)]
    encode_us, digest_us = (1e6 * _best_s(work) for work in (lambda: using.encode(hidden), lambda: digest(0, parts)))
    signer = Identity.ephemeral()
    lines = [Line(i, 1, b"r" * 16, b"s" * 16) for i in range(32)]
    sign_us = 1e6 * _best_s(lambda: Receipt.signed(lines, b"i" * 16, signer), calls=20)
    receipt = Receipt.signed(lines, b"i" * 16, signer)
    check_us = 1e6 * _best_s(lambda: receipt.check(signer.peer_id, b"i" * 16), calls=20)
    return (
        f"A row of {WIDTH:,} values takes {encode_us:.0f} us to encode (`int8`) and {digest_us:.1f} us to digest, twice"
        f" at each hop; a receipt of 32 steps {sign_us:.0f} us to sign ({sign_us / 32:.0f} us per step, in a thread of"
        f" its own) and {check_us:.0f} us to check. A step carries 40 bytes more for each hop that it passed."
    )


def _best_s(work: object, calls: int = 200) -> float:
    best = np.inf
    for _ in range(calls):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        best = min(best, time.perf_counter() - began)
    return float(best)


# ------------------------------------------------------------------------------------------------------------ the page


def run(sessions: int = SESSIONS, tokens: int = TOKENS, scale: float = 1.0) -> str:
    """Measures, prints and writes the page. Returns it.

    Args:
        scale: of the number of drawn sessions.
    """
    page = report(sessions, tokens, scale)
    print(page)
    DOC.write_text(page)
    return page


def report(sessions: int, tokens: int, scale: float) -> str:
    """The page, as Markdown."""
    rng = np.random.default_rng(7)
    counts = {name: sessions if name == DEFAULT else max(1, sessions // 3) for name in CODECS}
    recordings = {name: record(count, tokens, name) for name, count in counts.items()}
    pairs = {name: honest_pairs(recordings[name], name) for name in CODECS}
    every = [pair for found in pairs.values() for pair in found]
    compared, accused = sum(p.compared for p in every), sum(p.accused for p in every)
    margins = {
        "margin": f"{MARGIN:g}",
        "typical": f"{TYPICAL_MARGIN:g}",
        "least": LEAST,
        "most": MOST,
        "several": SEVERAL,
    }
    lines = [INTRODUCTION.format(cost=costs(), **margins), pairs_table(pairs[DEFAULT]), "", codecs_table(pairs)]
    lines.append(f"\n{compared:,} tokens of honest peers were compared; accused: **{accused}**.\n")
    lines += [LENGTHS, lengths_table(max(1, sessions // 4), tokens, DEFAULT), ""]
    lines += ["## How far lies are from the truth\n", _lies_table(recordings[DEFAULT]), ""]
    lines += ["## How long liars survive\n", *_odds_section(recordings[DEFAULT], scale, rng)]
    found = verdicts(recordings[DEFAULT])
    lines.append(
        f"\n{found.given:,} verdicts with a third peer, the liar audited or auditing: {found.undecided:,} could not be"
        f" decided, {found.wrong} named the honest one.\n"
    )
    return "\n".join(lines) + TAIL


def _lies_table(recordings: list[Recording]) -> str:
    lines = [
        "| lie | which is | said to be | smallest | median | tokens noticed | answers noticed |",
        "|---|---|---|---|---|---|---|",
    ]
    for lie, what in WHAT.items():
        for kind in (FLOAT32, BFLOAT16):
            spans = told(recordings, lie, kind)
            apart = torch.cat([span.apart for span in spans])
            tokens = torch.cat([span.apart > span.within.token for span in spans]).double().mean()
            answers = [
                bool((row > span.within.token).any()) or finds(row, span.within.typical)
                for span in spans
                for row in span.apart
            ]
            cells = f"{apart.min():.2f} | {apart.median():.2f} | {tokens:.1%} | {np.mean(answers):.1%}"
            lines.append(f"| {lie} | {what} | {kind.dtype} | {cells} |")
    return "\n".join(lines)


def _signs(spans: list[Told]) -> Signs:
    """What of each token is further off than one may be, and than the median may be."""
    alone, typical = (
        np.stack([(span.apart > getattr(span.within, name)).flatten().numpy() for span in spans])
        for name in ("token", "typical")
    )
    return Signs(alone, typical)


def _odds_section(recordings: list[Recording], scale: float, rng: np.random.Generator) -> list[str]:
    head = (
        "| liar | audits | survives 200 steps | 2,000 steps | drawn step alone: 200 | 2,000 | found at step (median) |"
        " tokens shown before | wrong tokens that got through | with 10 % of auditors alike |"
    )
    lines, bars = [head, "|---" * 10 + "|"], []
    for name, (lie, kind, habit) in HABITS.items():
        signs = _signs(told(recordings, lie, kind))
        for rate in RATES:
            short = odds(signs, habit, rate, int(DRAWN * scale), SHORT, rng)
            long = odds(signs, habit, rate, int(DRAWN_LONG * scale), LONG, rng)
            alike = odds(signs, habit, rate, int(DRAWN_LONG * scale), SHORT, rng, blind=SHARE)
            lines.append(_odds_row(name, rate, short, long, alike))
            if rate == 0.05 and name == NOISY:
                bars.append(("a constant liar, 200 steps at 5 %", short.survives, short.survives_single, 1e-4))
            if rate == 0.05 and name == SELDOM:
                bars.append(("lies on 1 % of steps, 2,000 steps at 5 %", long.survives, long.survives_single, 0.4))
    lines += [
        "",
        "| bar: it survives | measured | if the drawn step alone were compared | at most |",
        "|---|---|---|---|",
    ]
    lines += [f"| {what} | {found:.1e} | {single:.1e} | {most:g} |" for what, found, single, most in bars]
    return lines


def _odds_row(name: str, rate: float, short: Odds, long: Odds, alike: Odds) -> str:
    through, through_alike = (HOPS * SHARE * each.unseen for each in (short, alike))
    cells = [
        name,
        f"{rate:.0%}",
        _share(short.survives),
        _share(long.survives),
        _share(short.survives_single),
        _share(long.survives_single),
        "never" if short.steps == np.inf else f"{short.steps:.0f}",
        "-" if short.shown == np.inf else f"{short.shown:.0f}",
        _share(through),
        _share(through_alike),
    ]
    return f"| {' | '.join(cells)} |"


def _share(share: float) -> str:
    return "0" if share == 0 else f"{share:.1e}" if share < 0.01 else f"{share:.1%}"


@click.command()
@click.option("--quick", is_flag=True, help="Only see that it works: smaller, nothing is written.")
def liars(quick: bool) -> None:
    """Liars among peers, against audits; writes docs/lying-peers.md."""
    if quick:
        click.echo(report(2, 40, 0.01))
    else:
        run()
