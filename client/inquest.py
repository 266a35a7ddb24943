"""Who holds a step that is late? Judged from what each hop says of its progress. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import PeerError
from protocol.messages import Progress

Report = Progress | PeerError
"""What a hop says, or why it says nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Where the step is.

    Attributes:
        lost: hops that do not answer, and may be what the step waits for.
        stuck: the step left hop `stuck - 1` (0: the client) and has not reached hop `stuck` (the number of hops: the
            client), though both answer.
        busy: the hop that has the step and is not done with it.
        expected_s: until it is, as that hop says.
    """

    lost: tuple[int, ...] = ()
    stuck: int | None = None
    busy: int | None = None
    expected_s: float = 0.0


def judge(reports: Sequence[Report], step_id: int) -> Finding:
    """The finding on the step `step_id`, which the client has sent to the first hop.

    A hop that is silent while the step is known to be busy elsewhere before it is left alone: it may answer by the time
    it is needed. But where one hop is lost, all silent ones from there on are replaced in one go.
    """
    for index, report in enumerate(reports):
        if isinstance(report, PeerError):
            return Finding(lost=tuple(i for i, r in enumerate(reports) if i >= index and isinstance(r, PeerError)))
        if report.sent > step_id:
            continue
        if report.next_step > step_id:  # computed, but the next hop does not take it
            following = reports[index + 1] if index + 1 < len(reports) else None
            if isinstance(following, PeerError):
                continue
            if isinstance(following, Progress) and following.received > step_id:
                continue
            return Finding(stuck=index + 1)
        if report.received > step_id:
            return Finding(busy=index, expected_s=report.expected_ms / 1e3)
        return Finding(stuck=index)
    return Finding(stuck=len(reports))


def signs_of_life(reports: Sequence[Report], finding: Finding) -> tuple[object, ...]:
    """What should change while the step is only slow: bytes that arrive, steps that are computed; and the queue of the
    hop that has it. While it does, a line is slow, not cut, and a peer busy, not stuck."""
    known = [(r.arriving_bytes, r.next_step) if isinstance(r, Progress) else None for r in reports]
    busy = reports[finding.busy] if finding.busy is not None else None
    return (finding.busy, finding.stuck, *known, busy.queue if isinstance(busy, Progress) else None)
