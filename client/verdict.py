"""Who lies, where two peers that should have computed the same did not? A third one decides. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Culprit = Literal["nobody", "audited", "auditor", "both"]


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two results are apart, and how far two honest peers of these kinds may be."""

    apart: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Could both be honest?"""
        return self.apart <= self.bound


def judge(
    first: Distance, third_from_audited: Distance | None = None, third_from_auditor: Distance | None = None
) -> Culprit:
    """Whom to avoid.

    Args:
        first: between the audited peer and its auditor.
        third_from_audited, third_from_auditor: between a third peer and each of them; None: there is none.

    Returns:
        `both` where it cannot be told: there is no third peer, or it agrees with neither, or with both.
    """
    if first.agrees:
        return "nobody"
    if third_from_audited is None or third_from_auditor is None:
        return "both"
    if third_from_audited.agrees == third_from_auditor.agrees:
        return "both"
    return "auditor" if third_from_audited.agrees else "audited"
