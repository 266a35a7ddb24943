"""Liars among peers, against audits: `python -m benchmarks liars`; writes docs/lying-peers.md.

The comparison and the verdict are the client's own, on activations of the demo model that are recorded once per number
format; sessions are drawn from these.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.liars_odds import Habit, Mask, Odds, odds
from benchmarks.liars_page import INTRODUCTION, TAIL
from benchmarks.lies import KINDS, LIES, WHAT, Recording, name_of, record, rows
from client.tolerance import MARGIN, Kind, bound, distances
from client.verdict import Culprit, Distance, judge
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
SELDOM: Final = "wrong on 1 % of steps"
HABITS: Final[dict[str, tuple[str, Habit]]] = {
    **{lie: (lie, Habit()) for lie in LIES},
    "wrong from step 50 on": (NOISY, Habit(first=50)),
    SELDOM: (NOISY, Habit(share=0.01)),
    "wrong for one client": (NOISY, Habit()),
}


@dataclass(frozen=True, slots=True)
class Honest:
    """How far apart honest peers of two kinds were: of all tokens that were compared, the median and the largest."""

    audited: Kind
    auditor: Kind
    codec: str
    compared: int
    median: float
    largest: float

    @property
    def limit(self) -> float:
        return bound(self.audited, self.auditor, self.codec)


def honest_pairs(recordings: Sequence[Recording], codec_name: str) -> list[Honest]:
    """All pairs of kinds, those of different weights too."""
    found = []
    for audited in KINDS:
        for auditor in KINDS:
            apart = torch.cat(
                [
                    distances(recording.single[audited][i], recording.bulk[auditor][i])
                    for recording in recordings
                    for i in range(len(recording.inputs))
                ]
            )
            found.append(Honest(audited, auditor, codec_name, len(apart), float(apart.median()), float(apart.max())))
    return found


def lie_distances(recordings: list[Recording], lie: str, auditor: Kind) -> NDArray[np.float64]:
    """Of each token that came one by one, how far the liar is from an honest auditor."""
    apart = []
    for recording, part in rows(recordings):
        told = LIES[lie](recording)
        apart += [distances(t[part], b[part]) for t, b in zip(told, recording.bulk[auditor], strict=True)]
    return torch.cat(apart).numpy()


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How many were given, could not be decided, and named the honest one of both."""

    given: int = 0
    undecided: int = 0
    wrong: int = 0

    def plus(self, said: Culprit, right: Culprit) -> Verdicts:
        return Verdicts(self.given + 1, self.undecided + (said == "both"), self.wrong + (said not in ("both", right)))


def verdicts(recordings: list[Recording]) -> Verdicts:
    """Over all lies that are noticed, with third peers of each number format; and the other way round, where it is the
    auditor that lies."""
    found, auditor = Verdicts(), KINDS[0]
    for recording, part in rows(recordings):
        honest = recording.bulk[auditor][:, part]
        for lie in LIES.values():
            told = lie(recording)[:, part]
            for third in KINDS[:2]:
                limits = bound(auditor, auditor, "int8"), bound(third, auditor, "int8")
                others = recording.bulk[third][:, part]
                for a, b, c in zip(
                    *(_flat(pair) for pair in ((told, honest), (others, told), (others, honest))), strict=True
                ):
                    first, to_liar, to_honest = (
                        Distance(a, limits[0]),
                        Distance(b, limits[1]),
                        Distance(c, limits[1]),
                    )
                    if not first.agrees:
                        found = found.plus(judge(first, to_liar, to_honest), "audited")
                        found = found.plus(judge(first, to_honest, to_liar), "auditor")
    return found


def _flat(pair: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    one, other = (tensor.reshape(-1, tensor.shape[-1]) for tensor in pair)
    return list(distances(one, other).tolist())


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
    pairs = [pair for name in CODECS for pair in honest_pairs(recordings[name], name)]
    compared, accused = sum(p.compared for p in pairs), sum(p.compared for p in pairs if p.largest > p.limit)
    lines = [INTRODUCTION.format(cost=costs(), margin=f"{MARGIN:g}"), _pairs_table(pairs)]
    lines.append(f"\n{compared:,} tokens of honest peers were compared; accused: **{accused}**.\n")
    lines += ["## How far lies are from the truth\n", _lies_table(recordings["int8"]), ""]
    lines += ["## How long liars survive\n", *_odds_section(recordings["int8"], scale, rng)]
    found = verdicts(recordings["int8"])
    lines.append(
        f"\n{found.given:,} verdicts with a third peer, the liar audited or auditing: {found.undecided:,} could not be"
        f" decided, {found.wrong} named the honest one.\n"
    )
    return "\n".join(lines) + TAIL


def _pairs_table(pairs: Sequence[Honest]) -> str:
    lines = ["| audited | auditor | codec | compared | median | largest | allowed |", "|---|---|---|---|---|---|---|"]
    for p in pairs:
        names = f"{name_of(p.audited)} | {name_of(p.auditor)} | `{p.codec}`"
        lines.append(f"| {names} | {p.compared:,} | {p.median:.1e} | {p.largest:.1e} | {p.limit:.2f} |")
    return "\n".join(lines)


def _noticed(recordings: list[Recording], lie: str, kind: Kind) -> Mask:
    return np.asarray(lie_distances(recordings, lie, kind) > bound(kind, kind, "int8"))


def _lies_table(recordings: list[Recording]) -> str:
    float32, bfloat16 = KINDS[:2]
    lines = [
        "| lie | which is | smallest | median | noticed, float32 | noticed, bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for lie, what in WHAT.items():
        apart = lie_distances(recordings, lie, float32)
        shares = [float(_noticed(recordings, lie, kind).mean()) for kind in (float32, bfloat16)]
        lines.append(
            f"| {lie} | {what} | {apart.min():.2f} | {np.median(apart):.2f} | {shares[0]:.1%} | {shares[1]:.1%} |"
        )
    return "\n".join(lines)


def _odds_section(recordings: list[Recording], scale: float, rng: np.random.Generator) -> list[str]:
    head = (
        "| liar | audits | survives 200 steps | 2,000 steps | drawn step alone: 200 | 2,000 | found at step (median) |"
        " tokens shown before | wrong tokens that got through | with 10 % of auditors alike |"
    )
    lines, bars = [head, "|---" * 10 + "|"], []
    for name, (lie, habit) in HABITS.items():
        noticed = _noticed(recordings, lie, KINDS[0])
        for rate in RATES:
            short = odds(noticed, habit, rate, int(DRAWN * scale), SHORT, rng)
            long = odds(noticed, habit, rate, int(DRAWN_LONG * scale), LONG, rng)
            alike = odds(noticed, habit, rate, int(DRAWN_LONG * scale), SHORT, rng, blind=SHARE)
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
