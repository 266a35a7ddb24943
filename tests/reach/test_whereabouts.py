"""Peers that ask each other over real gRPC whether they reach each other, and a peer that draws its conclusions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from dht.record import PeerRecord
from peer.config import PeerConfig
from peer.reach import whereabouts as module
from peer.reach.dialback import DialBacks, Helper, answers, ask
from peer.reach.places import Place
from peer.reach.relay import RelaySettings, open_relay
from peer.reach.whereabouts import Around, Whereabouts, keeping_track
from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, BadRecord, PeerFull, Unseen, VersionMismatch
from protocol.limits import WIRE_VERSION
from protocol.span import Span
from tests.harness import identity
from tests.reach.support import answering

TIMEOUT_S = 15.0
HOME = "45.77.30.2"


def record(index: int, port: int, **values: Any) -> PeerRecord:
    who = identity(index)
    return PeerRecord(
        peer_id=who.peer_id,
        fingerprint="f",
        n_blocks=1,
        span=Span(0, 1),
        state="online",
        addresses=(f"127.0.0.1:{port}",),
        certificate_der=who.certificate_der,
        wire_version=WIRE_VERSION,
        **values,
    )


def asking(*ports: int, index: int = 1) -> pb.DialBackRequest:
    certificate = identity(index).certificate_der
    return pb.DialBackRequest(wire_version=WIRE_VERSION, certificate=certificate, ports=ports)


# ---------------------------------------------------------------------------- dialling back


async def test_a_peer_learns_where_it_is_reached_and_nothing_else() -> None:
    async with answering(0) as helper, answering(1) as mine, answering(2) as not_mine:
        said = await ask(
            [Helper(record(0, helper), f"127.0.0.1:{helper}")], identity(1).certificate_der, [mine, not_mine]
        )
        (answer,) = said
        assert answer.host == "127.0.0.1" and answer.reached == {mine}, "another certificate answers at the other port"


async def test_who_does_not_answer_says_nothing() -> None:
    async with answering(0) as helper:
        gone = Helper(record(0, helper), f"127.0.0.1:{helper}")
    assert await ask([gone], identity(1).certificate_der, [1]) == []


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (asking(), BadMessage),
        (asking(1, 2, 3, 4, 5), BadMessage),
        (asking(70000), BadMessage),
        (pb.DialBackRequest(wire_version=WIRE_VERSION, certificate=bytes(5000), ports=[1]), BadMessage),
        (pb.DialBackRequest(wire_version=WIRE_VERSION, certificate=b"no certificate", ports=[1]), BadRecord),
        (pb.DialBackRequest(wire_version=WIRE_VERSION + 1, ports=[1]), VersionMismatch),
    ],
)
async def test_nonsense_is_refused(request_: pb.DialBackRequest, error: type[Exception]) -> None:
    with pytest.raises(error):
        await DialBacks().answer(request_, "ipv4:127.0.0.1:5")


async def test_who_comes_through_a_relay_is_not_seen() -> None:
    dial_backs = DialBacks()
    dial_backs.is_relayed = {("127.0.0.1", 5)}.__contains__
    for connection in ("ipv4:127.0.0.1:5", "unix:/tmp/socket"):
        with pytest.raises(Unseen):
            await dial_backs.answer(asking(1), connection)
    assert list((await dial_backs.answer(asking(1), "ipv4:127.0.0.1:6")).reached) == []


async def test_nobody_has_others_dial_without_end() -> None:
    dial_backs = DialBacks(clock=lambda: 0.0)
    with pytest.raises(PeerFull) as caught:
        for _ in range(100):
            await dial_backs.answer(asking(1), "ipv4:127.0.0.1:6")
    assert caught.value.retry_after_s == 60.0


# ---------------------------------------------------------------------------- conclusions


@dataclass
class World:
    """What the peer with identity 1 is told of everything else."""

    port: int
    peers: list[PeerRecord] = field(default_factory=list)
    announced: list[Place] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    dialable: bool = True
    whereabouts: Whereabouts | None = None

    async def announce(self) -> None:
        if self.whereabouts is not None:
            self.announced.append(self.whereabouts.place(self.port))

    def set_dialable(self, dialable: bool) -> None:
        self.dialable = dialable

    @contextlib.asynccontextmanager
    async def tracked(self, **settings: Any) -> AsyncIterator[Whereabouts]:
        host: Any = SimpleNamespace(port=self.port, sessions=[], service=SimpleNamespace(dial_backs=DialBacks()))
        around = Around(
            hosts=lambda: ["127.0.0.1"],
            peers=lambda: self.peers,
            port=lambda: self.port,
            host=lambda: host,
            announce=self.announce,
            set_dialable=self.set_dialable,
            say=self.said.append,
        )
        config = PeerConfig(host="127.0.0.1", **settings)
        async with keeping_track(identity(1), config, around) as self.whereabouts:
            async with asyncio.timeout(TIMEOUT_S):
                await self.whereabouts.known.wait()
            yield self.whereabouts


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def test_alone_it_announces_what_it_believes() -> None:
    async with answering(1) as port:
        world = World(port)
        async with world.tracked() as whereabouts:
            assert whereabouts.place(port) == Place((f"127.0.0.1:{port}",))
            assert world.dialable and world.said == []


async def test_on_one_machine_its_relay_is_tried_too() -> None:
    async with answering(1) as port, answering(0) as helper:
        world = World(port, [record(0, helper)])
        async with world.tracked() as whereabouts:
            place = whereabouts.place(port)
            assert place.addresses == (f"127.0.0.1:{port}",) and place.relay_places == 64
            assert await answers(f"127.0.0.1:{place.relay_port}", identity(1).certificate_der)
        async with world.tracked(relay=False) as whereabouts:
            assert whereabouts.place(port) == Place((f"127.0.0.1:{port}",))


async def test_a_hidden_peer_is_reached_through_relays_until_it_is_hidden_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DOUBT_EVERY_S", 0.2)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.05)
    reached: list[int] = []

    def lie(request: pb.DialBackRequest) -> pb.DialBackReply:
        return pb.DialBackReply(host=HOME, reached=reached)

    settings = RelaySettings("127.0.0.1", 0, 1e5)
    async with (
        answering(1) as port,
        answering(0, lie) as helper,
        open_relay(identity(2).peer_id, settings) as one,
        open_relay(identity(3).peer_id, settings) as two,
    ):
        world = World(port, [record(0, helper)])
        world.peers += [
            record(index, relay.port, relay_port=relay.port, relay_places=1) for index, relay in ((2, one), (3, two))
        ]
        async with world.tracked() as whereabouts:
            await until(lambda: len(whereabouts.place(port).addresses) == 2)
            place = whereabouts.place(port)
            assert set(place.addresses) == {f"127.0.0.1:{one.port}", f"127.0.0.1:{two.port}"} and place.relayed == 2
            assert place.relay_port == 0, "who cannot be reached relays for nobody"
            assert not world.dialable and world.announced[-1] == place
            assert all([await answers(at, identity(1).certificate_der) for at in place.addresses])
            await until(lambda: "2 relays" in world.said[-1])

            await one.close()
            await until(lambda: whereabouts.place(port).addresses == (f"127.0.0.1:{two.port}",))
            await until(lambda: world.announced[-1].relayed == 1)

            reached.append(port)
            await until(lambda: whereabouts.place(port) == Place((f"{HOME}:{port}",)))
            await until(lambda: two.board.providers == 0)
            assert world.dialable and world.said[-1] == f"others reach this machine at {HOME}"


async def test_a_hidden_peer_without_a_relay_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_TIES_S", 0.1)
    async with answering(1) as port, answering(0, lambda _: pb.DialBackReply(host=HOME)) as helper:
        world = World(port, [replace(record(0, helper), relay_port=0)])
        async with world.tracked() as whereabouts:
            assert whereabouts.place(port) == Place()
            await until(lambda: bool(world.said))
            (line,) = world.said
            assert f"forward TCP port {port}" in line and "--announce-host" in line and "no peer relays" in line
