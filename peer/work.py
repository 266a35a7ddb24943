"""A step on its way through the compute thread, in one piece or in several."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from torch import Tensor

from peer.scheduler import Waiting
from peer.session import Session
from peer.tally import Kind
from protocol.messages import HIDDEN, HopTrace, Step
from slicing import PagedCache, SpanCache

DECODE_TOKENS = 16
"""A step of so many tokens, or fewer, is somebody's next token, with a few that were guessed."""


@dataclass(slots=True, eq=False)
class Work:
    """A step of a session. The event loop makes it and awaits `done`; the compute thread has it while it runs.

    Attributes:
        number: grows with each step that comes to the peer.
        cache: the session's, which it loses when it is dropped meanwhile.
        arrived_s: `time.perf_counter()` when it had arrived.
        rows, tokens: of its hidden states; tokens per row.
        packs: can it share a pass with steps of other sessions?
        inputs: its tensors, decoded, once it has begun.
        outputs: of its pieces so far, [..., rows, tokens, H].
        computed: tokens per row that went through the blocks.
        error: why it failed.
        cost: what it took, once it is through.
        began_s: when its first piece was begun.
        withdrawn: nobody waits for it any more.
    """

    number: int
    session: Session
    step: Step
    arrived_s: float
    rows: int
    tokens: int
    packs: bool
    done: asyncio.Future[HopTrace | None]
    cache: SpanCache | PagedCache | None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    computed: int = 0
    error: BaseException | None = None
    cost: HopTrace | None = None
    began_s: float = 0.0
    withdrawn: bool = False

    @property
    def decodes(self) -> bool:
        """Is it the next step of an answer, rather than a prompt?"""
        return self.rows * self.tokens <= DECODE_TOKENS

    @property
    def kind(self) -> Kind:
        return "decode" if self.decodes else "prefill"

    def waiting(self) -> Waiting:
        """As the scheduler sees it."""
        left = self.rows * (self.tokens - self.computed)
        return Waiting(self.number, self.session.client, self.session.span, left, self.packs, self.decodes)


def shape_of(step: Step) -> tuple[int, int]:
    """Rows and tokens per row of a step's hidden states, as its header says; (0, 0) if it brings none."""
    specs = [spec for spec in step.tensors if spec.name == HIDDEN and len(spec.shape) >= 3]
    return (specs[0].shape[-3] if specs else 0), sum(spec.keep or spec.shape[-2] for spec in specs)
