"""How far apart honest peers are, pair by pair, and whom of them the client would accuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.lies import KINDS, Recording, name_of
from client.sample import LEAST, MOST, Compared, Sample
from client.tolerance import Kind, Tolerance, distances

_NOTHING = torch.zeros(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Reach:
    """How far something was, and how far it may be."""

    found: float
    allowed: float

    @property
    def share(self) -> float:
        return self.found / self.allowed


@dataclass(frozen=True, slots=True)
class Honest:
    """Honest peers of two kinds.

    Attributes:
        compared: tokens.
        median: of all of these.
        token: the one that was furthest off.
        stretch: the median of tokens in a row that came nearest to what is allowed of it.
        accused: tokens and sessions of which the client would have said that somebody lies.
    """

    audited: Kind
    auditor: Kind
    compared: int
    median: float
    token: Reach
    stretch: Reach
    accused: int


def honest_pairs(recordings: Sequence[Recording], codec_name: str) -> list[Honest]:
    """All pairs of kinds, those of different weights too."""
    return [_pair(recordings, audited, auditor, codec_name) for audited in KINDS for auditor in KINDS]


def _pair(recordings: Sequence[Recording], audited: Kind, auditor: Kind, codec_name: str) -> Honest:
    sessions, tokens, stretches, accused = list[Tensor](), list[Reach](), list[Reach](), 0
    for recording in recordings:
        within = Tolerance.between(audited, auditor, codec_name, len(recording.span))
        for single, bulk in zip(recording.single[audited], recording.bulk[auditor], strict=True):
            apart = distances(single, bulk)
            sessions.append(apart)
            tokens.append(Reach(float(apart.max()), within.token))
            stretches.append(Reach(max(medians(apart)), within.typical))
            accused += int((apart > within.token).sum()) + finds(apart, within.typical)
    compared = torch.cat(sessions)
    token, stretch = (max(reaches, key=lambda reach: reach.share) for reaches in (tokens, stretches))
    return Honest(audited, auditor, len(compared), float(compared.median()), token, stretch, accused)


def medians(apart: Tensor) -> list[float]:
    """Of the tokens that the client looks at together, for all of these in a row."""
    return [float(apart[max(0, stop - MOST) : stop].median()) for stop in range(LEAST, len(apart) + 1)]


def finds(apart: Tensor, limit: float) -> bool:
    """Would the client find, in a session, that these distances are not typical?"""
    tokens = [Compared(0, at, _NOTHING, _NOTHING, each) for at, each in enumerate(apart.tolist())]
    return Sample().take(tokens, limit) is not None


def pairs_table(pairs: Sequence[Honest]) -> str:
    lines = [
        "| audited | auditor | compared | median | largest | allowed | in a row, largest median | allowed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in pairs:
        names = f"{name_of(p.audited)} | {name_of(p.auditor)}"
        reaches = " | ".join(f"{reach.found:.1e} | {reach.allowed:.3f}" for reach in (p.token, p.stretch))
        lines.append(f"| {names} | {p.compared:,} | {p.median:.1e} | {reaches} |")
    return "\n".join(lines)


def codecs_table(pairs: dict[str, list[Honest]]) -> str:
    """How near all pairs came to what is allowed, codec by codec."""
    lines = [
        "| codec | compared | furthest token, of what is allowed | furthest median, of what is allowed |",
        "|---|---|---|---|",
    ]
    for name, found in pairs.items():
        token, stretch = max(p.token.share for p in found), max(p.stretch.share for p in found)
        lines.append(f"| `{name}` | {sum(p.compared for p in found):,} | {token:.0%} | {stretch:.0%} |")
    return "\n".join(lines)
