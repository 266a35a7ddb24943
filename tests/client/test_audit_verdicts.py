"""Audits that liars try to get out of, or in which others fail: nobody gets through, no bystander is called a liar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from client.account import Account, Memory, Partial, Unaudited, uncropped
from client.audit import Auditor
from client.blame import Blame
from client.comparison import Mismatch
from client.config import ClientConfig
from client.hop import Hop
from client.ledger import Ledger
from client.session import Session
from client.shadow import Recomputation, Shadow
from client.tolerance import Kind, Tolerance
from client.verdict import Distance
from protocol.errors import PeerFull, SessionLost
from protocol.journal import Entry, Part
from protocol.messages import CacheOp, HopTrace
from protocol.span import Span
from tests.client.test_liars import LIAR, Peers, use
from tests.liars import Lie, lies_from


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, all_peers: Peers) -> Tensor:
    with use(all_peers, checkpoint, audit=0.0) as client:
        return client.answer()


Recall = Callable[[list[Entry]], list[Entry]]


def recalls(monkeypatch: pytest.MonkeyPatch, peers: Peers, host: int, change: Recall) -> None:
    """From now on this peer recalls something else than it keeps."""
    compute, honestly = cast(Any, peers.hosts[host].house).compute, peers.hosts[host].house.compute.run

    async def run(function: Any, *arguments: Any) -> Any:
        found = await honestly(function, *arguments)
        return change(found) if getattr(function, "__name__", "") == "recall" else found

    monkeypatch.setattr(compute, "run", run)


def accused(blame: Blame) -> set[str]:
    return set(blame._liars)


# ------------------------------------------------------------------------------------------- who recalls only a part


@pytest.mark.parametrize("first", [0, 6], ids=["nothing", "only what is right"])
def test_who_recalls_only_a_part_is_given_up(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    peers.liars[0].lie = lies_from(first)
    recalls(monkeypatch, peers, 0, lambda kept: [entry for entry in kept if entry.step_id < first])
    with use(peers, checkpoint, speculate="off", avoid_s=60.0) as client:
        assert torch.equal(client.answer(), wanted)
        assert client.swarm.blame.avoided() == {peers.ids[0]} and not accused(client.swarm.blame)
        assert any("recalls only a part" in event for event in client.events), client.events
        assert peers.ids[0] not in client.chain
        client.events.clear()
        assert torch.equal(client.answer(), wanted), "it is not used again"
        assert not client.events


def test_who_says_that_its_lies_were_cropped_is_convicted(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cropped(kept: list[Entry]) -> list[Entry]:
        entries = [entry.cropped(entry.tokens) for entry in kept]
        return [replace(entry, parts=tuple(negated(part) for part in entry.parts)) for entry in entries]

    def negated(part: Part) -> Part:
        return replace(part, payload=bytes(byte ^ 0x80 for byte in part.payload))

    recalls(monkeypatch, peers, 0, cropped)
    with use(peers, checkpoint, speculate="off") as client:
        assert torch.equal(client.answer(), wanted)
        assert accused(client.swarm.blame) == {peers.ids[0]}


def test_where_nobody_else_is_there_it_is_said_once(
    checkpoint: Path, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    recalls(monkeypatch, peers, 0, lambda kept: [])
    with use(peers, checkpoint, (0, 1, 2), speculate="off", avoid_s=60.0) as client:
        client.answer()
        (event,) = client.events
        assert "what it does cannot be audited" in event
        assert client.swarm.blame.avoided() == {peers.ids[0]}


@pytest.mark.parametrize("hangs", [False, True], ids=["refuses", "hangs"])
def test_a_last_hop_that_signs_nothing_is_audited_all_the_same(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    recalled: list[int] = []

    async def rest(session: Any) -> Any:
        recalled.append(1)
        if hangs:
            await asyncio.Event().wait()
        raise SessionLost("nothing is kept")

    peers.liars[LIAR].lie = lies_from(6)
    monkeypatch.setattr("client.account.SIGN_TIMEOUT_S", 0.2)
    monkeypatch.setattr(peers.hosts[LIAR].house.receipts, "rest", rest)
    with use(peers, checkpoint, speculate="off") as client:
        assert torch.equal(client.answer(), wanted)
        assert recalled and accused(client.swarm.blame) == {peers.ids[LIAR]}


# ------------------------------------------------------------------------------------------------ who could not decide


def lying_auditors(peers: Peers) -> list[int]:
    """Whichever of the two that are no part of the chain comes first, lies. Returns who did."""
    liars: list[int] = []

    def lies_if_first(index: int) -> Lie:
        def lie(step_id: int, hidden: Tensor) -> Tensor:
            if not liars:
                liars.append(index)
            return hidden + torch.randn_like(hidden) if liars[0] == index else hidden

        return lie

    for index in (2, 3):
        peers.liars[index].lie = lies_if_first(index)
    return liars


def test_where_the_third_peer_is_full_nobody_is_called_a_liar(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    liars, opening = lying_auditors(peers), Shadow.open
    full: list[Shadow] = []

    async def open_(shadow: Shadow, *times: float) -> None:
        if liars and not full and not shadow.peer_ids & {peers.ids[0], peers.ids[4]}:
            full.append(shadow)
            raise PeerFull("no room")
        await opening(shadow, *times)

    monkeypatch.setattr(Shadow, "open", open_)
    with use(peers, checkpoint, avoid_s=60.0) as client:
        assert torch.equal(client.answer(), wanted)
        assert full and not accused(client.swarm.blame)
        assert client.swarm.blame.avoided() == {peers.ids[LIAR], peers.ids[liars[0]]}
        assert any("do not agree" in event for event in client.events), client.events
        assert client.chain[-1] not in client.swarm.blame.avoided()


def test_who_recants_before_the_third_peer_decides_is_the_only_one_accused(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    liars, want = lying_auditors(peers), Auditor._want

    def wants_last(audits: Auditor, hop: Hop, step_id: int) -> None:
        if hop.link.span.start == 3:
            want(audits, hop, step_id)

    def forgets(kept: list[Entry]) -> list[Entry]:
        if not liars or not kept:
            return kept
        (part, *others) = kept[0].parts
        return [replace(kept[0], parts=(replace(part, payload=bytes(len(part.payload))), *others)), *kept[1:]]

    recalls(monkeypatch, peers, 0, forgets)
    monkeypatch.setattr(Auditor, "_want", wants_last)
    with use(peers, checkpoint) as client:
        assert torch.equal(client.answer(), wanted)
        assert peers.ids[0] in accused(client.swarm.blame)
        assert peers.ids[LIAR] not in client.swarm.blame.avoided()


def test_an_auditor_that_gives_another_shape_has_failed(
    checkpoint: Path, peers: Peers, wanted: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (2, 3):
        peers.liars[index].lie = lambda step_id, hidden: hidden[..., :-1]
    with use(peers, checkpoint) as client, client.model.session() as session:
        assert torch.equal(client.answer(), wanted)
        stats = cast(Session, client.model.blocks.session_of(session.cache)).auditor.stats
    assert stats.unaudited["a peer that was needed failed"] and not stats.unaudited["it failed"], stats
    assert not client.swarm.blame.avoided() and not client.events


# ------------------------------------------------------------------------------------------------------------ in parts


@dataclass
class Others:
    """A shadow, as far as a verdict looks at it."""

    peer_ids: frozenset[str]
    kinds: frozenset[Kind] = frozenset({Kind("float32", "none")})
    n_hops: int = 1
    name: str = "others"

    def dismiss(self) -> None:
        pass


def auditor(blame: Blame, codec: str = "none") -> Auditor:
    spec, chain = cast(Any, type("Spec", (), {"codec": codec})), cast(Any, None)
    return Auditor(spec, cast(Any, None), blame, ClientConfig(), cast(Any, None), chain, lambda event: None)


def hop(peer_id: str = "audited", span: Span = Span(0, 3)) -> Any:  # noqa: B008
    peer = type("Peer", (), {"peer_id": peer_id, "dtype": "float32", "quantization": "nf4"})
    link = type("Link", (), {"peer": peer, "span": span})
    return type("Hop", (), {"link": link, "name": peer_id, "ledger": Ledger(0)})


@pytest.mark.parametrize("ids", [{"a"}, {"a", "b"}], ids=["one", "several"])
def test_of_several_that_were_outvoted_nobody_is_called_a_liar(ids: set[str]) -> None:
    blame = Blame(30.0)
    audits = auditor(blame)

    async def third(*arguments: Any) -> tuple[Distance, Distance]:
        return Distance(0.0, 1.0), Distance(2.0, 1.0)

    cast(Any, audits)._third = third
    case: Any = type("Case", (), {"hop": hop(), "drop_shadow": lambda: None})
    mismatch = Mismatch(0, 0, (), Distance(2.0, 1.0))
    asyncio.run(audits._decide(case, cast(Recomputation, Others(frozenset(ids))), mismatch))
    assert blame.avoided() == ids
    assert accused(blame) == (ids if len(ids) == 1 else set())
    assert audits.stats.liars == ([*ids] if len(ids) == 1 else [])


def test_a_shadow_of_mixed_kinds_is_as_far_off_as_any_of_them_may_be() -> None:
    exact, coarse = Kind("float32", "none"), Kind("float32", "nf4")
    within = auditor(Blame(30.0))._within
    mixed = cast(Recomputation, Others(frozenset("ab"), frozenset({exact, coarse}), n_hops=2))
    alike = cast(Recomputation, Others(frozenset("c"), frozenset({coarse})))
    unlike = Tolerance.between(coarse, exact, "none", 3, 2)
    assert within(hop(), [coarse], mixed) == unlike, "a part of it has other weights than the hop"
    assert within(hop(), [coarse], alike).token < unlike.token
    assert within(hop(), mixed.kinds, alike, mixed) == unlike


def step(step_id: int, position: int, *ops: CacheOp, tokens: int = 1) -> Entry:
    return Entry(position=position, tokens=tokens, rows=1, parts=(), ops=ops, step_id=step_id)


def memory(entries: list[Entry], said: range, upto: int) -> Memory:
    peer = hop()
    peer.ledger = Ledger(0)
    for step_id in said:
        peer.ledger.tell(step_id, HopTrace(0, 3, 0.0, 0, received=b"x", sent=b"y"))
    return Memory(peer, peer.ledger, max(said, default=-1), entries, upto)


LOG = [step(0, 0, tokens=5), *(step(step_id, 4 + step_id) for step_id in range(1, 6))]


def test_all_that_was_said_is_wanted_step_by_step() -> None:
    memory(LOG, range(6), 5).check(LOG)
    for left_out in range(6):
        kept = [entry for entry in LOG if entry.step_id != left_out]
        with pytest.raises(Partial) as caught:
            memory([*kept, step(9, 0, tokens=20)], range(6), 5).check(LOG)
        assert caught.value.step_id == left_out
    with pytest.raises(Partial):
        memory([step(0, 0, tokens=4), *LOG[1:]], range(6), 5).check(LOG)


def test_what_a_peer_was_told_joined_it_recalls_joined() -> None:
    kept = [step(3, 0, tokens=8), *LOG[4:]]
    memory(kept, range(4, 6), 5).check(LOG)
    with pytest.raises(Unaudited, match="joined"):
        memory(kept, range(4, 6), 2).check(LOG[:3])
    with pytest.raises(Partial):
        memory(LOG[4:], range(4, 6), 5).check(LOG)


def test_a_peer_that_is_being_told_leaves_out_nothing() -> None:
    with pytest.raises(Unaudited, match="not there yet") as caught:
        memory([], range(0), 5).check(LOG)
    assert not isinstance(caught.value, Partial)
    told = memory([], range(6), 5)
    told.hop.ledger = Ledger(1)
    with pytest.raises(Unaudited, match="began anew"):
        told.check(LOG)


def test_what_was_cropped_is_not_wanted() -> None:
    log = [
        step(0, 0, tokens=5),
        step(1, 5, tokens=4),
        step(2, 7, CacheOp("crop", (7,))),
        step(3, 4, CacheOp("crop", (4,))),
    ]
    assert [(entry.step_id, entry.position, entry.tokens) for entry in uncropped(log)] == [(0, 0, 4), (3, 4, 1)]
    assert [entry.step_id for entry in uncropped([*log, step(4, 0, CacheOp("reset"))])] == [4]


def test_an_account_of_nothing_is_none() -> None:
    nothing = memory([], range(6), 5)
    with pytest.raises(Partial):
        Account(nothing.hop, None, 0, LOG, [], False, (nothing,), tuple(LOG)).check()
