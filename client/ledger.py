"""What each hop of a chain says that it received and sent, and whether that fits together. Pure: no sockets, no clock.

Twice it says so: with the step (a later hop could have changed that on the way), which is compared before the step's
result is used; and in receipts that it signs. Where both contradict each other, the edge after the hop is to blame: it
signed something else than it sent, or somebody after it changed what it said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from protocol.errors import PeerFault
from protocol.journal import Entry, joined
from protocol.messages import HIDDEN, HopTrace
from protocol.receipts import Line

MOST_STEPS = 1 << 17  # of a session at one hop


def broken_edge(sent: bytes, trace: Sequence[HopTrace], received: bytes) -> int | None:
    """The first edge on a step's way over which something else came than was sent: 0 is that from the client to the
    first hop, `len(trace)` that from the last hop to the client. None: all is well.

    Args:
        sent: digest of what the client sent.
        trace: what the hops said, in order.
        received: digest of what the client received.
    """
    for index, hop in enumerate(trace):
        if not hop.received or hop.received != sent:
            return index
        sent = hop.sent
    return len(trace) if sent != received or not trace else None


@dataclass(slots=True)
class Ledger:
    """One hop's account of the steps that its peer computed since it began.

    Attributes:
        epoch: in which it began: what was said of older ones was said by others.
        doubt: the first step of which it signed something else than it had said; None: there is none.
    """

    epoch: int
    doubt: int | None = None
    _said: dict[int, HopTrace] = field(default_factory=dict)
    _signed: dict[int, Line] = field(default_factory=dict)

    def tell(self, step_id: int, said: HopTrace) -> None:
        """What came with a step."""
        if said.epoch >= self.epoch:
            self._said[step_id] = said
            self._compare(step_id)

    def sign(self, lines: Iterable[Line]) -> None:
        """Lines of a receipt, whose signature was checked. Receipts may overtake each other.

        Raises:
            PeerFault: it signed two accounts of one step, or accounts of more steps than there can be.
        """
        for line in lines:
            if len(self._signed) > MOST_STEPS:
                raise PeerFault("it signs for more steps than there can be")
            if line.epoch < self.epoch:
                continue  # of a session that it held before this one, under the same id
            if self._signed.setdefault(line.step_id, line) != line:
                raise PeerFault(f"it signed two accounts of step {line.step_id}")
            self._compare(line.step_id)

    def _compare(self, step_id: int) -> None:
        said, signed = self._said.get(step_id), self._signed.get(step_id)
        if said is None or signed is None or said.epoch != signed.epoch:
            return
        if (said.received, said.sent) != (signed.received, signed.sent):
            self.doubt = step_id if self.doubt is None else min(self.doubt, step_id)

    def has_said(self, step_id: int) -> bool:
        """Did it compute the result of this step that the client has? Otherwise another peer did, before it began."""
        return step_id in self._said

    def received(self, step_id: int) -> bytes | None:
        """Digest of what it computed the step from, as it signed, or else said; None: it did neither."""
        account = self._account(step_id)
        return None if account is None else account.received

    def sent(self, step_id: int) -> bytes | None:
        """Digest of what came out, likewise."""
        account = self._account(step_id)
        return None if account is None else account.sent

    def _account(self, step_id: int) -> Line | HopTrace | None:
        return self._signed.get(step_id) or self._said.get(step_id)

    def steps(self) -> list[int]:
        """The steps that it accounts for, in order. Where it was told several as one, that goes by the last of them."""
        return sorted(self._signed.keys() | self._said.keys())


def wrong_outputs(ledger: Ledger, outputs: Iterable[Entry]) -> list[Entry]:
    """Those of these outputs, as the peer recalls them, that are not what it accounts for. What it gives no account of
    is not judged."""
    return [entry for entry in outputs if (sent := ledger.sent(entry.step_id)) is not None and sent != entry.digest()]


def is_cropped(entry: Entry) -> bool:
    """Was a part of it taken back? Then its digest may be another, where it had several parts."""
    return any(part.spec.keep for part in entry.parts)


def is_input(ledger: Ledger, inputs: Sequence[Entry], first_step: int) -> bool:
    """Are these inputs, which are all since `first_step`, those from which the peer says that it computed?

    It may have been told several as one, which goes by the last of them. That they are not need not be a lie: what it
    was told may have been cropped since, or come from a peer that was replaced since, whose numbers differ a little.
    """
    left = list(inputs)
    for step_id in ledger.steps():
        if step_id < first_step or not left:
            continue
        count = sum(1 for entry in left if entry.step_id <= step_id)
        told, left = left[:count], left[count:]
        if told and joined(told).digest() != ledger.received(step_id):
            return False
    return not left


def first_altered(inputs: Iterable[Entry], outputs: Iterable[Entry]) -> int | None:
    """The first step whose output does not bring along what the input did beside hidden states; None: there is none.
    Steps that were joined on one side are not judged."""
    given = {entry.step_id: entry for entry in inputs}
    for entry in outputs:
        told = given.get(entry.step_id)
        if told is None or (told.position, told.tokens) != (entry.position, entry.tokens):
            continue
        if _beside_hidden(told) != _beside_hidden(entry):
            return entry.step_id
    return None


def _beside_hidden(entry: Entry) -> list[tuple[object, ...]]:
    return [
        (spec.name, spec.codec, spec.dtype, spec.shape, bytes(part.payload))
        for part in entry.parts
        if (spec := part.spec).name != HIDDEN
    ]
