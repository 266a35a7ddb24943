"""What entered one hop and what came out of it, as its peer stands by it: what others compute again in an audit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from client.hop import Hop
from client.ledger import Ledger, first_altered, is_cropped, is_input, wrong_outputs
from protocol.errors import PotluckError
from protocol.journal import Entry, StepLog

logger = logging.getLogger(__name__)

SIGN_TIMEOUT_S = 2.0  # for a receipt: whoever does not answer is not to make audits wait until the session ends


class Unaudited(Exception):  # not an error, but why there is no result
    """This audit cannot be made."""


class Partial(Unaudited):
    """A peer leaves out the step `step_id`, which it cannot have forgotten alone."""

    def __init__(self, hop: Hop, step_id: int) -> None:
        super().__init__("it recalls only a part")
        self.hop = hop
        self.step_id = step_id


class Recanted(Exception):
    """A peer contradicts what it had said itself, from the step `step_id` on. `why`: what it does."""

    def __init__(self, hop: Hop, step_id: int, why: str = "recalls something else than it sent") -> None:
        super().__init__(f"{hop.name} {why}")
        self.hop = hop
        self.step_id = step_id
        self.why = why


@dataclass(frozen=True, slots=True)
class Memory:
    """What one peer recalls of a session.

    Attributes:
        ledger: the hop's, when it was asked: another one since, if it began anew meanwhile.
        computed: the last step that it had accounted for by then; -1: none.
        entries: all that it told.
        upto: the step up to which its entries are looked at.
    """

    hop: Hop
    ledger: Ledger
    computed: int
    entries: list[Entry]
    upto: int

    @classmethod
    async def of(cls, hop: Hop, first_step: int, upto: int) -> Memory:
        """Asks the hop.

        Raises:
            PotluckError: it does not tell.
        """
        ledger = hop.ledger
        computed = max(ledger.steps(), default=-1)
        return cls(hop, ledger, computed, await hop.recall(first_step), upto)

    def check(self, wanted: Iterable[Entry]) -> None:
        """Are all of these steps among its entries?

        Raises:
            Unaudited: not yet, or not any more as they were.
            Partial: it had computed the step that is not there.
        """
        if self.hop.ledger is not self.ledger:
            raise Unaudited("a peer began anew meanwhile")
        looked_at = [entry for entry in self.entries if entry.step_id <= self.upto]
        for entry in wanted:
            if self._has(entry, looked_at):
                continue
            if entry.step_id <= self.computed and not self._has(entry, self.entries):
                raise Partial(self.hop, entry.step_id)
            raise Unaudited("what a peer was told is joined with later steps, or not there yet")

    def _has(self, wanted: Entry, entries: Sequence[Entry]) -> bool:
        """A step that the peer accounts for it has by itself; one from before it began may be joined with later ones,
        and goes by the last of them."""
        is_alone = self.ledger.has_said(wanted.step_id)
        at, stop = wanted.position, wanted.position + wanted.tokens
        for entry in entries:
            fits = entry.step_id == wanted.step_id if is_alone else entry.step_id >= wanted.step_id
            if fits and entry.position <= at < entry.position + entry.tokens:
                at = entry.position + entry.tokens
            if at >= stop:
                return True
        return at >= stop


@dataclass(frozen=True, slots=True)
class Account:
    """The account of `hop`, from the step `first_step` on.

    Attributes:
        before: the hop that gave the inputs; None: the client itself.
        is_last: nobody comes after the hop, and hidden states are all that it gives.
        memories: what was recalled by peers, in the order of the chain.
        wanted: what entered the chain in these steps, without what was cropped by the time all was recalled.
    """

    hop: Hop
    before: Hop | None
    first_step: int
    inputs: list[Entry]
    outputs: list[Entry]
    is_last: bool
    memories: tuple[Memory, ...] = ()
    wanted: tuple[Entry, ...] = ()

    def check(self) -> None:
        """Compares it with what its peers said and signed.

        Raises:
            Unaudited: it is not what they said, which need not be a lie.
            Partial: a peer leaves out what it must have.
            Recanted: it is not, which is one.
        """
        whole = {entry.step_id for entry in self.wanted if not is_cropped(entry)}
        for each, log in ((self.before, self.inputs), (self.hop, self.outputs)):
            if each is None:
                continue
            wrong = wrong_outputs(each.ledger, log)
            never_cropped = {step_id for step_id in whole if each.ledger.has_said(step_id)}  # whatever it says
            if sure := [entry for entry in wrong if not is_cropped(entry) or entry.step_id in never_cropped]:
                raise Recanted(each, sure[0].step_id)
            if wrong:
                raise Unaudited("what it sent was cropped since")
        for memory in self.memories:
            memory.check(self.wanted)
        if not is_input(self.hop.ledger, self.inputs, self.first_step):
            raise Unaudited("what it was told is no longer known")
        if not self.is_last and (step_id := first_altered(self.inputs, self.outputs)) is not None:
            raise Recanted(self.hop, step_id, "passes on other positions or masks than it was given")


async def recalled(
    hop: Hop, hops: Sequence[Hop], inputs: StepLog, results: StepLog, first_step: int, step_id: int
) -> Account:
    """The account of the steps from `first_step` to `step_id`, not compared yet with anything.

    Args:
        hops: of the chain, in order.
        inputs: what entered the first block.
        results: what came out of the last one.

    Raises:
        Unaudited: the hop does not belong to the chain any more.
        PotluckError: a peer does not tell.
    """
    hops = tuple(hops)
    if hop not in hops:
        raise Unaudited("the hop has left the chain")
    index = hops.index(hop)
    before = hops[index - 1] if index else None
    memories = []
    if before is None:
        entered = inputs.recall(first_step)
    else:
        memories.append(await Memory.of(before, first_step, step_id))
        entered = memories[-1].entries
    if hop is hops[-1]:
        left = [entry for entry in results.recall(first_step) if hop.ledger.has_said(entry.step_id)]
        await _sign(hop)
    else:
        memories.append(await Memory.of(hop, first_step, step_id))
        left = memories[-1].entries
    wanted = tuple(entry for entry in uncropped(inputs.recall(first_step)) if entry.step_id <= step_id)
    entered, left = ([entry for entry in log if entry.step_id <= step_id] for log in (entered, left))
    return Account(hop, before, first_step, entered, left, hop is hops[-1], tuple(memories), wanted)


async def _sign(hop: Hop) -> None:
    """Has the last hop sign what it said. Its audit needs nothing else from it, so it cannot refuse to be audited."""
    try:
        async with asyncio.timeout(SIGN_TIMEOUT_S):
            await hop.recall()
    except (PotluckError, TimeoutError) as error:
        logger.debug("%s signs nothing: %s", hop.name, error or "it takes its time")


def uncropped(entries: Iterable[Entry]) -> list[Entry]:
    """What is left of the entries of a log once all of its crops are made, also those of steps under way: peers that
    have come further may have made them."""
    left = list[Entry]()
    for entry in entries:
        for op in entry.ops:
            if op.kind in ("crop", "reset"):
                stop = op.values[0] if op.kind == "crop" else 0
                while left and left[-1].position >= stop:
                    left.pop()
                if left and left[-1].position + left[-1].tokens > stop:
                    left[-1] = left[-1].cropped(stop - left[-1].position)
        left.append(entry)
    return left
