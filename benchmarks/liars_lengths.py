"""What is typical of honest peers, and of weights of 4 bits, in hops of few and of many blocks."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from benchmarks.liars_pairs import medians
from benchmarks.lies import BFLOAT16, FLOAT32, computed, crossed, embedded
from client.tolerance import Kind, distances, typical
from protocol.span import Span

SPANS: Final = (Span(0, 1), Span(12, 13), Span(0, 3), Span(21, 24), Span(0, 12), Span(12, 24), Span(0, 24))
COARSE: Final = Kind("bfloat16", "nf4")


def lengths_table(sessions: int, tokens: int, codec_name: str) -> str:
    """Of these hops, with what an honest chain gives the first of their blocks."""
    lines = [
        "| blocks | float32, bfloat16: largest median | bfloat16, bfloat16 | allowed |"
        " nf4 weights, said to be bfloat16: smallest median | largest |",
        "|---|---|---|---|---|---|",
    ]
    hidden = embedded(sessions, tokens)
    for span in SPANS:
        before = computed(Span(0, span.start), FLOAT32, hidden, "none")[1] if span.start else hidden
        inputs = crossed(before, codec_name)
        found = {kind: computed(span, kind, inputs, codec_name) for kind in (FLOAT32, BFLOAT16, COARSE)}
        auditor = found[BFLOAT16][1]
        mixed, alike, lies = (_medians(found[kind][0], auditor) for kind in (FLOAT32, BFLOAT16, COARSE))
        limit = typical(FLOAT32, BFLOAT16, codec_name, len(span))
        cells = f"{max(mixed):.1e} | {max(alike):.1e} | {limit:.3f} | {min(lies):.1e} | {max(lies):.1e}"
        lines.append(f"| {span} | {cells} |")
    return "\n".join(lines)


def _medians(one: Tensor, other: Tensor) -> list[float]:
    return [median for a, b in zip(one, other, strict=True) for median in medians(distances(a, b))]
