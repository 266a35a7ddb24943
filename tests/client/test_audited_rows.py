"""Audits of batches with padding, and of beam search: rows that mean nothing, and rows that are moved about."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from client.moves import Moves
from client.padding import meaningful_rows
from client.session import Session
from protocol.errors import SessionLost
from protocol.journal import Entry, Part
from protocol.messages import ATTENTION_MASK, CacheOp, TensorSpec
from tests.client.test_liars import LIAR, Peers, use
from tests.liars import Lie

PADDED = torch.tensor([[5, 17, 3, 42, 8, 9], [0, 0, 0, 7, 21, 4], [0, 0, 61, 30, 2, 2]])
QUESTIONS: dict[str, dict[str, Any]] = {
    "padding": {"inputs": PADDED, "attention_mask": (PADDED != 0).long()},
    "beams": {"inputs": PADDED[:1], "attention_mask": torch.ones(1, 6).long(), "num_beams": 4},
    "padding and beams": {"inputs": PADDED, "attention_mask": (PADDED != 0).long(), "num_beams": 2},
}
NEW_TOKENS = 14


def answer(model: Any, question: str) -> Tensor:
    settings = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0, "do_sample": False}
    return cast(Tensor, model.generate(**QUESTIONS[question], **settings))


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> dict[str, Tensor]:
    """What the unsplit model answers."""
    from transformers import LlamaForCausalLM

    model = cast(Any, LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)).eval()
    return {question: answer(model, question) for question in QUESTIONS}


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_honest_peers_are_audited_and_nobody_is_accused(
    checkpoint: Path, peers: Peers, wanted: dict[str, Tensor], question: str, codec: str
) -> None:
    with use(peers, checkpoint, codec=codec) as client:
        sessions = kept_sessions(client.model)
        found = answer(client.model, question)
        assert codec != "none" or torch.equal(found, wanted[question])
        (session,) = sessions
        stats = session.auditor.stats
        assert stats.tokens >= 2 * (PADDED.shape[1] + NEW_TOKENS - 2), stats
        assert not stats.unaudited and not stats.liars and not client.events, (stats, client.events)


def kept_sessions(model: Any) -> list[Session]:
    """Those that the model begins from now on."""
    blocks, found = model.blocks, list[Session]()
    begun = blocks._new_session

    def begin(*arguments: Any, **settings: Any) -> Session:
        found.append(begun(*arguments, **settings))
        return found[-1]

    blocks._new_session = begin
    return found


def lies_to_one_row(step_id: int, hidden: Tensor) -> Tensor:
    if step_id < 5:
        return hidden
    told = hidden.clone()
    told[..., -1, :, :] *= -1
    return told


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("own", ["", pytest.param("3:6", marks=pytest.mark.slow)], ids=["others", "this client"])
def test_a_liar_is_found_and_the_answer_is_right(
    checkpoint: Path, peers: Peers, wanted: dict[str, Tensor], question: str, own: str
) -> None:
    peers.liars[LIAR].lie = lies_to_one_row
    settings = {"audit_blocks": own} if own else {}
    with use(peers, checkpoint, **settings) as client:
        assert torch.equal(answer(client.model, question), wanted[question])
        assert client.swarm.blame.avoided() == {peers.ids[LIAR]}
        who = "this client" if own else "two others"
        assert any(f"did not compute what {who} did" in event for event in client.events), client.events
        assert any("is made again" in event for event in client.events), client.events


def test_what_peers_make_of_padding_is_not_compared(checkpoint: Path, peers: Peers, wanted: dict[str, Tensor]) -> None:
    def other_padding(step_id: int, hidden: Tensor) -> Tensor:
        if step_id:
            return hidden
        told = hidden.clone()
        told[..., 1, :3, :] = 7.0
        return told

    lie: Lie = other_padding
    peers.liars[LIAR].lie = lie
    with use(peers, checkpoint) as client:
        assert torch.equal(answer(client.model, "padding"), wanted["padding"])
        assert not client.swarm.blame.avoided() and not client.events, client.events


def test_who_passes_on_another_mask_is_found(
    checkpoint: Path, peers: Peers, wanted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hidden states are right. The peer after it does what it is told."""
    worker = cast(Any, peers.hosts[0].engine)._worker
    onward = worker._onward

    def altered(session: Any, step: Any, hidden: Tensor) -> Entry:
        entry = onward(session, step, hidden)
        return replace(entry, parts=tuple(unmasked(part) for part in entry.parts))

    def unmasked(part: Part) -> Part:
        return replace(part, payload=b"\1" * part.spec.nbytes) if part.spec.name == ATTENTION_MASK else part

    monkeypatch.setattr(worker, "_onward", altered)
    with use(peers, checkpoint) as client:
        assert torch.equal(answer(client.model, "padding"), wanted["padding"])
        assert client.swarm.blame.avoided() == {peers.ids[0]}
        assert any("passes on other positions or masks" in event for event in client.events), client.events


def test_masks_that_change_backwards_convict_nobody_who_computed_under_them(
    checkpoint: Path, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first peer hides what came before in every other step. The one after it does what it is told each time."""
    worker = cast(Any, peers.hosts[0].engine)._worker
    onward = worker._onward

    def altered(session: Any, step: Any, hidden: Tensor) -> Entry:
        entry = onward(session, step, hidden)
        return replace(entry, parts=tuple(hiding(part) for part in entry.parts)) if step.step_id % 2 else entry

    def hiding(part: Part) -> Part:
        if part.spec.name != ATTENTION_MASK:
            return part
        rows, width = part.spec.shape
        return replace(part, payload=(bytes(5) + b"\1" * (width - 5)) * rows)

    monkeypatch.setattr(worker, "_onward", altered)
    monkeypatch.setattr("client.account.Account.check", lambda account: None)  # which would convict the first
    with use(peers, checkpoint, audit=0.2, audit_wait_s=20.0) as client:
        answer(client.model, "padding")
        assert peers.ids[1] not in client.swarm.blame.avoided(), client.events


@pytest.mark.parametrize("question", QUESTIONS)
def test_audits_go_on_where_a_peer_was_replaced(
    checkpoint: Path, peers: Peers, wanted: dict[str, Tensor], question: str
) -> None:
    """The new one is told all steps before, many of them joined to one."""
    peers.liars[0].lie = lambda step_id, hidden: hidden * torch.nan if step_id == 3 else hidden
    with use(peers, checkpoint) as client:
        sessions = kept_sessions(client.model)
        assert torch.equal(answer(client.model, question), wanted[question])
        (session,) = sessions
        assert peers.ids[0] in client.swarm.blame.avoided()
        assert not session.auditor.stats.liars, "it gave nonsense, and was refused"
        assert session.auditor.stats.tokens > 2 * (PADDED.shape[1] + 2), (session.auditor.stats, client.events)


# ------------------------------------------------------------------------------------------------------------ pure


def step(step_id: int, *ops: CacheOp) -> Entry:
    return Entry(position=4 + step_id, tokens=1, rows=2, parts=(), ops=ops, step_id=step_id)


def test_rows_are_moved_as_often_as_they_were() -> None:
    moves = Moves()
    swap, twice = CacheOp("reorder", (1, 0)), CacheOp("repeat", (2,))
    for entry in (step(0, twice), step(1, swap), step(2, CacheOp("crop", (5,)), swap), step(3), step(4, swap, twice)):
        moves.note(entry)
    assert moves.before(step(0), 0, is_empty=True) == (), "an empty cache has no rows"
    assert moves.before(step(2), 2, is_empty=False) == (swap,), "crops follow from where a step comes"
    assert moves.before(step(3), 3, is_empty=False) == ()
    assert moves.before(step(4), 1, is_empty=False) == (swap, swap, swap, twice), "of steps that were taken back, too"


def test_what_cannot_be_said_in_one_step_is_said_from_the_beginning() -> None:
    moves = Moves()
    for step_id in range(40):
        moves.note(step(step_id, CacheOp("reorder", (1, 0))))
    assert len(moves.before(step(30), 0, is_empty=False)) == 31
    with pytest.raises(SessionLost, match="more often"):
        moves.before(step(31), 0, is_empty=False)
    moves.note(step(40, CacheOp("reset")))
    with pytest.raises(SessionLost, match="began anew"):
        moves.before(step(40), 40, is_empty=False)
    assert moves.before(step(40), 0, is_empty=True) == ()


def masked(position: int, step_id: int, mask: list[list[int]]) -> Entry:
    tensor = torch.tensor(mask, dtype=torch.bool)
    spec = TensorSpec(ATTENTION_MASK, "none", "bool", tuple(tensor.shape), tensor.numel())
    part = Part(spec, bytes(tensor.flatten().tolist()))
    return Entry(position, tensor.shape[1] - position, tensor.shape[0], (part,), step_id=step_id)


def test_padding_is_what_the_client_masked() -> None:
    prompt = masked(0, 0, [[0, 1, 1], [1, 1, 1]])
    rows = meaningful_rows([prompt, masked(3, 1, [[1, 1, 1, 0], [0, 1, 1, 1]])])
    assert {position: found.tolist() for position, found in rows.items()} == {0: [1], 1: [0, 1], 2: [0, 1], 3: [1]}
    unmasked = Entry(position=2, tokens=2, rows=2, parts=(), step_id=2)
    assert meaningful_rows([prompt, unmasked]).keys() == {0, 1}, "what came in its place has no padding"
