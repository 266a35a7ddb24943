"""What hops say of their steps: what fits together, and what does not."""

from __future__ import annotations

import pytest

from client.ledger import Ledger, broken_edge, is_cropped, is_input, wrong_outputs
from protocol.errors import PeerFault
from protocol.journal import joined
from protocol.messages import HopTrace
from protocol.receipts import Line
from tests.protocol.entries import stepped

A, B, C, D, X = (bytes([letter]) * 16 for letter in b"abcdx")


def said(received: bytes, sent: bytes, start: int = 0, epoch: int = 1) -> HopTrace:
    return HopTrace(start, 0.0, 0.0, 0, epoch, received, sent)


def test_an_honest_chain_has_no_broken_edge() -> None:
    assert broken_edge(A, [said(A, B), said(B, C, 2), said(C, D, 4)], D) is None


@pytest.mark.parametrize(
    ("trace", "received", "edge"),
    [
        ([said(X, B), said(B, C, 2)], C, 0),
        ([said(A, X), said(B, C, 2)], C, 1),
        ([said(A, B), said(X, C, 2)], C, 1),
        ([said(A, B), said(B, X, 2)], C, 2),
        ([said(A, B), said(B, C, 2)], X, 2),
        ([said(A, B), said(b"", b"", 2)], C, 1),  # it does not say
        ([said(b"", b"")], b"", 0),
        ([], A, 0),  # somebody took out what others said
    ],
)
def test_the_first_edge_is_named_over_which_something_else_came(
    trace: list[HopTrace], received: bytes, edge: int
) -> None:
    assert broken_edge(A, trace, received) == edge


@pytest.mark.parametrize("signs_first", [True, False])
def test_who_signs_something_else_than_was_said_is_doubted_from_there_on(signs_first: bool) -> None:
    ledger = Ledger(epoch=1)
    told = [lambda: ledger.tell(7, said(A, B)), lambda: ledger.sign([Line(6, 1, C, D), Line(7, 1, A, X)])]
    for tell in told[::-1] if signs_first else told:
        assert ledger.doubt is None
        tell()
    assert ledger.doubt == 7
    assert ledger.sent(7) == X, "what it signed is what counts"


def test_what_others_said_before_it_began_is_not_its_own() -> None:
    ledger = Ledger(epoch=3)
    ledger.tell(7, said(A, B, epoch=2))  # of the peer in whose place it is
    ledger.sign([Line(6, 2, A, B), Line(7, 3, A, C)])  # of a session that it held before
    assert ledger.doubt is None
    assert ledger.steps() == [7]
    assert (ledger.received(7), ledger.sent(7), ledger.sent(6)) == (A, C, None)


def test_nobody_signs_two_accounts_of_a_step() -> None:
    ledger = Ledger(epoch=1)
    ledger.sign([Line(3, 1, A, B)])
    ledger.sign([Line(2, 1, A, B), Line(3, 1, A, B)])  # receipts may overtake each other, and come twice
    with pytest.raises(PeerFault, match="two accounts of step 3"):
        ledger.sign([Line(3, 1, A, C)])


def test_what_a_peer_was_told_as_one_is_recognised() -> None:
    entries = [stepped(step_id, step_id, bytes([step_id]) * 16) for step_id in range(6)]
    ledger = Ledger(epoch=1)
    ledger.sign([Line(3, 1, joined(entries[:4]).digest(), X), *(Line(i, 1, entries[i].digest(), X) for i in (4, 5))])
    assert is_input(ledger, entries, 0)
    assert is_input(ledger, entries[4:], 4)
    assert is_input(ledger, entries[:5], 0), "it has gone on since"
    assert not is_input(ledger, entries[2:], 2), "of what it was told as one, only a part is there"
    assert not is_input(ledger, [*entries[:5], stepped(5, 5, b"other" * 4)], 0)
    assert not is_input(ledger, [*entries, stepped(6, 6, b"1234" * 4)], 0), "it does not account for that"


def test_what_a_peer_recalls_must_be_what_it_signed() -> None:
    entries = [stepped(step_id, step_id, bytes([step_id]) * 16) for step_id in range(3)]
    ledger = Ledger(epoch=1)
    ledger.sign(Line(each.step_id, 1, X, each.digest()) for each in entries[:2])
    assert wrong_outputs(ledger, [entries[0].cropped(1), *entries[1:]]) == [], "for the last one it gives no account"
    other = stepped(1, 1, b"1234" * 4)
    assert wrong_outputs(ledger, [entries[0], other]) == [other]
    assert is_cropped(entries[0].cropped(1)) and not is_cropped(entries[0])
