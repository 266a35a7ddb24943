"""Receipts: signed for one session, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, PeerFault
from protocol.frames import ReplyAssembler
from protocol.journal import Part, StepLog, joined
from protocol.limits import PAYLOAD_BYTES
from protocol.messages import CacheOp
from protocol.receipts import Line, Receipt, digest
from tests.harness import identity
from tests.protocol.entries import stepped

SESSION, OTHER = b"s" * 16, b"o" * 16
LINES = (Line(0, 1, b"a" * 16, b"b" * 16), Line(1, 1, b"c" * 16, b"d" * 16))


def test_a_receipt_survives_the_wire() -> None:
    receipt = Receipt.signed(LINES, SESSION, identity(0))
    message = pb.InferReply.FromString(receipt.to_proto().SerializeToString())
    found = ReplyAssembler(PAYLOAD_BYTES).feed(message)
    assert found == receipt
    receipt.check(identity(0).peer_id, SESSION)


def test_a_receipt_says_nothing_elsewhere() -> None:
    receipt = Receipt.signed(LINES, SESSION, identity(0))
    changed = replace(receipt, lines=(LINES[0], replace(LINES[1], sent=b"x" * 16)))
    for peer, session, shown in [(1, SESSION, receipt), (0, OTHER, receipt), (0, SESSION, changed)]:
        with pytest.raises(PeerFault, match="not the peer's own"):
            shown.check(identity(peer).peer_id, session)


@pytest.mark.parametrize(
    "message",
    [
        pb.Receipt(lines=[pb.ReceiptLine(received=b"short", sent=b"d" * 16)]),
        pb.Receipt(lines=[pb.ReceiptLine(received=b"c" * 16, sent=b"d" * 16)] * 1025),
        pb.Receipt(public_key=b"k" * 1025),
    ],
    ids=["digest", "lines", "key"],
)
def test_nonsense_is_refused(message: pb.Receipt) -> None:
    with pytest.raises(BadMessage):
        Receipt.from_proto(message)


def test_a_digest_knows_bytes_and_how_they_are_read() -> None:
    one = stepped(0, 0, b"0123" * 4)
    spec = one.parts[0].spec
    assert one.digest() == digest(0, [(spec, memoryview(b"0123" * 4))]) == one.cropped(1).digest()
    others = [stepped(0, 0, b"0124" * 4).parts[0], *(Part(replace(spec, **change), one.parts[0].payload) for change in (
        {"dtype": "float16"}, {"shape": (1, 4, 1)}, {"name": "mask"}, {"codec": "int8"},
    ))]  # fmt: skip
    assert stepped(0, 1, b"0123" * 4).digest() != one.digest()
    assert all(digest(0, [(other.spec, other.payload)]) != one.digest() for other in others)


def test_both_ends_of_an_edge_take_the_same_digest_of_joined_steps() -> None:
    log = StepLog(keeps_all=True)
    for step_id in range(20):
        log.put(stepped(step_id, step_id, bytes([step_id]) * 16))
    (batch, *_) = log.since(0)
    assert batch.step_id == 11
    step = batch.step(epoch=3)
    assert joined(log.recall(0)[:12]).digest() == digest(0, step.parts()) == batch.digest()


def test_a_log_recalls_its_steps_one_by_one_as_they_are_now() -> None:
    log = StepLog(keeps_all=True)
    for step_id in range(20):
        log.put(stepped(step_id, step_id, b"0123" * 4))
    assert [kept.step_id for kept in log.recall(0)] == list(range(20))
    assert [kept.step_id for kept in log.recall(15)] == list(range(15, 20))
    log.put(stepped(20, 5, b"0123" * 4, CacheOp("crop", (5,))))
    for step_id in range(21, 30):
        log.put(stepped(step_id, step_id - 15, b"0123" * 4))
    assert [kept.step_id for kept in log.recall(0)] == [0, 1, 2, 3, 4, *range(20, 30)], "the crop is done by now"
