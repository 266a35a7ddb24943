"""What entered one hop and what came out of it, as its peer stands by it: what others compute again in an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client.hop import Hop
from client.ledger import first_altered, is_cropped, is_input, wrong_outputs
from protocol.journal import Entry, StepLog


class Unaudited(Exception):  # not an error, but why there is no result
    """This audit cannot be made."""


class Recanted(Exception):
    """A peer contradicts what it had said itself, from the step `step_id` on. `why`: what it does."""

    def __init__(self, hop: Hop, step_id: int, why: str = "recalls something else than it sent") -> None:
        super().__init__(f"{hop.name} {why}")
        self.hop = hop
        self.step_id = step_id
        self.why = why


@dataclass(frozen=True, slots=True)
class Account:
    """The account of `hop`, from the step `first_step` on.

    Attributes:
        before: the hop that gave the inputs; None: the client itself.
        is_last: nobody comes after the hop, and hidden states are all that it gives.
    """

    hop: Hop
    before: Hop | None
    first_step: int
    inputs: list[Entry]
    outputs: list[Entry]
    is_last: bool

    def check(self) -> None:
        """Compares it with what its peers said and signed.

        Raises:
            Unaudited: it is not what they said, which need not be a lie.
            Recanted: it is not, which is one.
        """
        for each, log in ((self.before, self.inputs), (self.hop, self.outputs)):
            if each is None:
                continue
            wrong = wrong_outputs(each.ledger, log)
            if sure := [entry for entry in wrong if not is_cropped(entry)]:
                raise Recanted(each, sure[0].step_id)
            if wrong:
                raise Unaudited("what it sent was cropped since")
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
    entered = inputs.recall(first_step) if before is None else await before.recall(first_step)
    if hop is hops[-1]:
        left = [entry for entry in results.recall(first_step) if hop.ledger.has_said(entry.step_id)]
        await hop.recall()  # for its receipt
    else:
        left = await hop.recall(first_step)
    entered, left = ([entry for entry in log if entry.step_id <= step_id] for log in (entered, left))
    return Account(hop, before, first_step, entered, left, hop is hops[-1])
