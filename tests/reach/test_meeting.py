"""Ways to a hidden peer that go round its relay, with real sockets on loopback: who meets, who does not, and what
is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import psutil
import pytest
import torch

from client.channels import Channels
from dht.record import PeerRecord
from peer.reach import meetings as meetings_module
from peer.reach.meetings import Meetings
from peer.reach.relay import Relay, RelaySettings, open_relay
from peer.reach.switchboard import RelayLimits
from peer.reach.tether import Tether
from protocol import meeting as meeting_module
from protocol.bypass import Bypass, find_bypass
from protocol.channel import connected, open_channel
from protocol.errors import BadMessage, PeerLost
from protocol.frames import step_frames
from protocol.hosts import address, connection_of
from protocol.identity import certificate_name
from protocol.limits import MESSAGE_BYTES
from protocol.loop import new_event_loop
from protocol.meeting import is_worth_dialling
from protocol.ping import round_trip_ms
from protocol.potluck_pb2 import PingRequest
from protocol.potluck_pb2_grpc import PeerStub
from protocol.relay_frames import (
    MAX_BODY_BYTES,
    TOKEN_BYTES,
    End,
    Frame,
    FrameReader,
    Kind,
    came,
    here,
    meet,
    met,
    seek,
    sought,
)
from protocol.span import Span
from slicing import load_span, resolve
from tests.client.test_session import N_BLOCKS as SESSION_BLOCKS
from tests.client.test_session import inputs, run, swarm
from tests.client.test_session import reference as unsplit
from tests.harness import identity, record_of
from tests.peer.test_push import FIRST, N_BLOCKS, SECOND, peers, reference, same, steps
from tests.reach.support import answering, hello_of
from tests.reach.test_addresses import carried_by, record
from tests.waiting import until

TIMEOUT_S = 10.0


@dataclass
class Place:
    """A relay, and a hidden peer (identity 1) that is tied to it and goes to meetings."""

    relay: Relay
    meetings: Meetings
    tying: asyncio.Task[None]
    at: str  # where the relay is

    async def find(self) -> Bypass:
        return await find_bypass([self.at], identity(1).certificate_der)


@contextlib.asynccontextmanager
async def tied(
    limits: RelayLimits | None = None,
    *,
    comes: bool = True,
    port: int | None = None,
    host: str = "127.0.0.1",
    mbit_per_s: float = 1e5,
) -> AsyncIterator[Place]:
    """`port`: where identity 1 answers; None: it is made. `host`: the relay's."""
    settings = RelaySettings(host, 0, mbit_per_s, limits=limits or RelayLimits())
    async with (
        contextlib.nullcontext(port) if port is not None else answering(1) as port,
        open_relay(identity(0).peer_id, settings) as relay,
        asyncio.TaskGroup() as tasks,
    ):
        meetings = Meetings(lambda: ("127.0.0.1", port), tasks)

        def go(relay: End, token: bytes) -> None:
            if comes:
                meetings.sought("relay", relay, token)

        end = host, relay.port
        tether = Tether(identity(1), identity(0).peer_id, (end,), lambda: ("127.0.0.1", port), go)
        tying = asyncio.create_task(tether.run())
        async with asyncio.timeout(TIMEOUT_S):
            await tether.welcome
        try:
            yield Place(relay, meetings, tying, address(*end))
        finally:
            tying.cancel()
            with contextlib.suppress(asyncio.CancelledError, PeerLost):
                await tying
            for task in tasks._tasks:  # type: ignore[attr-defined]
                task.cancel()


# ---------------------------------------------------------------------------- together


async def test_a_client_that_was_met_counts_at_its_own_address(tiny_llama: Callable[[int], Path]) -> None:
    folder = tiny_llama(SESSION_BLOCKS)
    async with swarm(folder, "0:3", "3:6") as (hosts, known, session, _), tied(port=hosts[1].port) as place:
        hidden, channels = replace(record_of(hosts[1]), addresses=(place.at,), relayed=1), Channels()
        known.records = [record_of(hosts[0]), hidden]
        known.channel, known.approach = channels.to, channels.approach  # type: ignore[assignment,method-assign]
        asked: list[tuple[str, str]] = []

        def whence(connection: str) -> str:
            asked.append((connection, place.meetings.whence(connection)))
            return "ipv4:192.0.2.7:5000"

        hosts[1].service.whence = whence
        await run(session, inputs(1))
        ((mine, there),) = place.meetings._met.items()
        assert (connection_of(*mine), connection_of(*there)) in asked
        assert set(hosts[1].house.gate.accounts._streams) == {"192.0.2.7"}
        assert place.meetings.whence("ipv4:127.0.0.1:1") == "ipv4:127.0.0.1:1"
        await session.close()
        await channels.close()


async def goes_round_the_relay(host: str = "127.0.0.1") -> None:
    async with tied(host=host) as place:
        bypass = await place.find()
        channel = open_channel(bypass.address, identity(1).certificate_der, max_message_bytes=MESSAGE_BYTES)
        assert await round_trip_ms(channel, TIMEOUT_S) is not None
        await until(lambda: place.relay.board.calls == place.relay.board.seeks == 0)
        assert place.relay.carried_bytes == 0 and place.relay.met == 1 and place.meetings.came == 1
        await place.relay.close()
        with contextlib.suppress(PeerLost):
            await place.tying
        assert await round_trip_ms(channel, TIMEOUT_S) is not None, "what was met outlives the relay"
        assert not bypass.is_over
        await channel.close()
        await until(lambda: bypass.is_over)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, new_event_loop])
def test_a_client_goes_round_the_relay(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(goes_round_the_relay())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_as_well_where_addresses_are_long() -> None:
    await goes_round_the_relay("::1")


async def test_new_sessions_use_the_way_that_was_found_and_the_relay_when_it_ends() -> None:
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        await channels.approach([there])
        assert await carried_by(channels.to(there), place.relay) == 0
        (bypass,) = channels._bypasses.values()
        bypass.close()
        assert await carried_by(channels.to(there), place.relay) > 0
        met = place.relay.met
        await channels.go_direct([there])
        assert place.relay.met == met, "it is tried again only after a while"
        await channels.close()


async def test_a_way_that_was_found_stays_when_the_peer_has_other_relays() -> None:
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        await channels.approach([there])
        channel = channels.to(there)
        elsewhere = replace(there, addresses=("127.0.0.1:1",))
        assert channels.to(elsewhere) is channel and len(channels) == 1
        await channels.go_direct([elsewhere])
        assert await carried_by(channels.to(elsewhere), place.relay) == 0 and place.relay.met == 1
        await channels.close()


async def test_a_session_goes_on_through_the_relay_when_the_way_past_it_ends(tiny_llama: Callable[[int], Path]) -> None:
    """It is taken up where it was: nobody is blamed, and nothing is computed again."""
    folder = tiny_llama(SESSION_BLOCKS)
    async with swarm(folder, "0:3", "3:6") as (hosts, known, session, events), tied(port=hosts[1].port) as place:
        hidden, channels = replace(record_of(hosts[1]), addresses=(place.at,), relayed=1), Channels()
        known.records = [record_of(hosts[0]), hidden]
        known.channel, known.approach = channels.to, channels.approach  # type: ignore[assignment,method-assign]
        hosts[1].service.whence = place.meetings.whence
        given = inputs(8)
        outputs = await run(session, given[:4])
        assert place.relay.joined == 0 and place.meetings.came == 1
        (bypass,) = channels._bypasses.values()
        bypass.close()
        outputs += await run(session, given[4:], start=10)
        whole = load_span(resolve(str(folder)), Span(0, SESSION_BLOCKS), dtype=torch.float32)
        assert all(map(torch.equal, outputs, unsplit(whole, given)))
        assert place.relay.joined == 1
        assert (session.stats.reroutes, session.stats.replayed_tokens, events) == (0, 0, [])
        await session.close()
        await channels.close()


async def test_a_way_that_falls_silent_is_left_once_the_peer_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.channels.DOUBT_S", 0.0)
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        await channels.approach([there])
        channel = channels.to(there)
        assert channels.to(there, doubted=True) is not channel, "though it has one address only"
        assert await carried_by(channels.to(there), place.relay) > 0
        await channels.close()


async def test_the_relay_is_left_once_no_session_uses_it() -> None:
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        used = PeerStub(channels.to(there))  # type: ignore[no-untyped-call]  # as a hop of a session has it
        await used.Ping(PingRequest(), timeout=TIMEOUT_S)
        await channels.go_direct([there])
        assert await carried_by(channels.to(there), place.relay) < 200, "more than late acknowledgements"
        await used.Ping(PingRequest(), timeout=TIMEOUT_S)
        assert place.relay.board.calls == 1
        del used
        await until(lambda: place.relay.board.calls == place.relay.board.seeks == 0)
        await channels.close()


async def test_a_session_that_begins_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.channels.APPROACH_S", 0.2)
    async with tied(RelayLimits(dial_s=1.0), comes=False) as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        began_s = asyncio.get_running_loop().time()
        await channels.approach([there])
        await channels.approach([there])
        assert 0.2 <= asyncio.get_running_loop().time() - began_s < 0.8
        assert await carried_by(channels.to(there), place.relay) > 0
        await channels.close()


async def test_who_does_not_want_to_is_not_met() -> None:
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels(direct=False)
        await channels.approach([there])
        await channels.go_direct([there])
        assert place.relay.met == 0 and await carried_by(channels.to(there), place.relay) > 0
        await channels.close()


async def test_a_peer_in_no_sessions_way_is_not_met() -> None:
    async with tied() as place:
        there, channels = record(place.relay.port, relayed=1), Channels()
        async with channels.lent(there, keep=True) as channel:
            assert await round_trip_ms(channel, TIMEOUT_S) is not None
        await channels.go_direct([there])
        assert place.relay.met == 0
        await channels.close()


@pytest.mark.parametrize(("mbit_per_s", "prompt"), [(1e5, 1), (1.6, 3000)], ids=["quick", "slow"])
async def test_a_peers_stream_to_the_next_one_goes_over_to_the_way_round(
    tiny_llama: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, mbit_per_s: float, prompt: int
) -> None:
    """Steps come in order before, at, and after that, and the answers are the unsplit model's bits; what the relay has
    still to carry then, it carries."""
    folder = tiny_llama(N_BLOCKS)
    async with (
        peers(folder, FIRST, SECOND) as two,
        tied(port=two.hosts[1].port, mbit_per_s=mbit_per_s) as place,
    ):
        hidden = replace(record_of(two.hosts[1]), addresses=(place.at,), relayed=1)

        async def find(peer_id: str, useless: PeerRecord | None = None) -> PeerRecord | None:
            return hidden if peer_id == hidden.peer_id else None

        monkeypatch.setattr(two.links(), "_resolve", find)
        first, second = await two.chain()
        tokens = [prompt, *[1] * 29]  # before the first receipt
        model = load_span(resolve(str(folder)), Span(0, N_BLOCKS), dtype=torch.float32)
        sent, carried = steps(tokens), []
        for one, wanted in zip(sent, reference(model, tokens, Span(0, N_BLOCKS)), strict=True):
            await first.send(*step_frames(one))
            same([await second.result()], [wanted])
            carried.append(place.relay.carried_bytes)
            await asyncio.sleep(0.05)
        assert place.meetings.came == 1 and carried[0] > 0 and carried[-10] == carried[-1], carried
        assert two.hosts[1].house.intake.pushed == len(tokens), "none of them went through the client"


# ---------------------------------------------------------------------------- those that fail


async def test_nobody_comes() -> None:
    async with tied(RelayLimits(dial_s=0.2), comes=False) as place:
        with pytest.raises(PeerLost, match="the relay ended the meeting"):
            await place.find()
        await until(lambda: place.relay.board.calls == place.relay.board.seeks == 0)


async def test_clients_that_seek_shut_out_none_that_call() -> None:
    """A peer that goes to no meetings keeps each of them waiting."""
    async with tied(RelayLimits(seeks_per_block=20), comes=False) as place:
        seeking = [asyncio.create_task(place.find()) for _ in range(20)]
        await until(lambda: place.relay.board.seeks == 16)
        channel = open_channel(place.at, identity(1).certificate_der, max_message_bytes=MESSAGE_BYTES)
        assert await round_trip_ms(channel, TIMEOUT_S) is not None
        await channel.close()
        for task in seeking:
            task.cancel()
        await asyncio.gather(*seeking, return_exceptions=True)
        await until(lambda: place.relay.board.seeks == 0)


async def test_one_home_does_not_take_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings_module, "PER_BLOCK", 2)
    channels: list[tuple[grpc.aio.Channel, Bypass]] = []
    async with tied() as place:
        for number in range(4):
            bypass = await place.find()
            channel = open_channel(bypass.address, identity(1).certificate_der, max_message_bytes=MESSAGE_BYTES)
            assert await connected(channel, 3.0) is (number < 2), number
            channels.append((channel, bypass))
        channel, _ = channels[0]
        await channel.close()
        await until(lambda: place.meetings._held.total() == 1)
        (await place.find()).close()
        await until(lambda: place.meetings.came == 3)
        for channel, bypass in channels:
            await channel.close()
            bypass.close()
        await until(lambda: not place.meetings._held)


async def test_a_client_that_has_enough_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the moment when the way was found."""
    opened = Bypass.open

    async def stopped(bypass: Bypass, connection: socket.socket) -> None:
        await opened(bypass, connection)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    monkeypatch.setattr(Bypass, "open", stopped)
    async with tied() as place:
        before = psutil.Process().num_fds()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(place.find())
        await until(lambda: psutil.Process().num_fds() <= before)


async def test_a_name_that_is_none() -> None:
    for name in ("a..b", "x" * 64):
        with pytest.raises(PeerLost, match="name is none"):
            await find_bypass([f"{name}:4000"], identity(1).certificate_der)
        tether = Tether(identity(1), identity(0).peer_id, ((name, 4000),), lambda: None)
        with pytest.raises(PeerLost, match="name is none"):
            await tether.run()


async def test_nobody_of_that_name() -> None:
    async with tied() as place:
        with pytest.raises(PeerLost, match="no peer of that name is registered"):
            await find_bypass([place.at], identity(2).certificate_der)


async def test_there_is_no_relay() -> None:
    with pytest.raises(PeerLost, match="no relay"):
        await find_bypass([], identity(2).certificate_der)
    with pytest.raises(PeerLost):
        await find_bypass(["127.0.0.1:1"], identity(2).certificate_der)


async def test_no_dial_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a router that picks another port for each destination."""
    monkeypatch.setattr(meeting_module, "APPROACH_S", 0.3)
    async with tied() as place:
        before = psutil.Process().num_fds()
        monkeypatch.setattr(meeting_module, "is_worth_dialling", lambda *_, near: False)
        with pytest.raises(PeerLost, match="no dial got through"):
            await place.find()
        await until(lambda: psutil.Process().num_fds() <= before)


async def test_it_is_another_peer_that_answers() -> None:
    """A relay that lies about where a peer is: the certificate tells."""
    async with tied() as place, answering(2) as other:
        place.meetings._target = lambda: ("127.0.0.1", other)
        bypass = await place.find()
        channel = open_channel(bypass.address, identity(1).certificate_der, max_message_bytes=MESSAGE_BYTES)
        assert not await connected(channel, 3.0)
        await channel.close()
        bypass.close()


async def test_a_port_is_for_one_connection() -> None:
    async with tied() as place:
        bypass = await place.find()
        host, _, port = bypass.address.partition(":")
        _, first = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError):
            reader, second = await asyncio.open_connection(host, int(port))
            assert await reader.read() == b""
            second.close()
        assert not bypass.is_over and bypass._splice.first.transport is not None
        first.close()
        bypass.close()


async def test_who_is_sought_too_often_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings_module, "PER_RELAY", 1)
    async with tied(RelayLimits(dial_s=0.3)) as place:
        place.meetings._quota = meetings_module.Quota(1, 10, 1e9)
        (await place.find()).close()
        with pytest.raises(PeerLost, match="ended the meeting"):
            await place.find()


@pytest.mark.parametrize("answer", [Kind.DATA, Kind.HERE])
async def test_who_mistakes_a_meeting_for_a_call_ends_both(answer: Kind) -> None:
    """The peer's side, by hand: it is sought and comes with DATA, or is called and comes with HERE."""
    async with tied(comes=False) as place:
        tokens: asyncio.Queue[bytes] = asyncio.Queue()
        (provider,) = place.relay.board._providers.values()
        said = provider.line.say
        provider.line.say = lambda frame: tokens.put_nowait(frame.body)  # type: ignore[method-assign]
        reader, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
        name = certificate_name(identity(1).peer_id)
        if answer is Kind.DATA:
            writer.write(seek(name).encode())
        else:
            writer.write(hello_of(name))
        token = await asyncio.wait_for(tokens.get(), TIMEOUT_S)
        there, back = await asyncio.open_connection("127.0.0.1", place.relay.port)
        back.write((Frame(answer, token) if answer is Kind.DATA else here(token, ("127.0.0.1", 5001))).encode())
        for end in (reader, there):
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(end.read(), TIMEOUT_S) == b""
        await until(lambda: place.relay.board.calls == place.relay.board.seeks == 0)
        provider.line.say = said  # type: ignore[method-assign]
        writer.close()
        back.close()


async def test_who_seeks_and_goes_on_talking_is_ended() -> None:
    async with tied(comes=False) as place:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.relay.port)
        writer.write(seek(certificate_name(identity(1).peer_id)).encode())
        await until(lambda: place.relay.board.seeks == 1)
        writer.write(b"more")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), TIMEOUT_S) == b""
        await until(lambda: place.relay.board.calls == place.relay.board.seeks == 0)
        assert place.relay.refusals["bad-message"] == 1
        writer.close()


# ---------------------------------------------------------------------------- what is said

A, B, C = ("45.77.1.2", 4001), ("10.1.0.2", 4002), ("2001:db8::1", 4003)


def test_what_is_said_is_heard() -> None:
    assert sought(seek("name")) == "name"
    assert came(here(bytes(TOKEN_BYTES), C)) == (bytes(TOKEN_BYTES), C)
    assert met(meet(A, [B, C])) == (A, (B, C))
    assert met(meet(("::ffff:45.77.1.2", 4001), [B]))[0] == A
    reader = FrameReader()
    reader.feed(meet(A, [B, C]).encode())
    assert [met(frame) for frame in reader.frames()] == [(A, (B, C))]


MALFORMED = (
    b"", b"x", b"1.2.3.4:5", b"1.2.3.4:5 1.2.3.4:0", b"1.2.3.4:5 host:7", b"1.2.3.4:5 1.2.3.4:99999", b"1.2.3.4:5 " * 6,
    b"1.2.3.4:5 1.2.3.4:0000199999", b"\xff\xff", b"1.2.3.4:5 1.2.3.4:\xc2\xb2",
    b"1.2.3.4:5 " + b"9" * (MAX_BODY_BYTES - 10),
)  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED)
def test_what_is_malformed_is_refused(body: bytes) -> None:
    with pytest.raises(BadMessage):
        met(Frame(Kind.MEET, body))
    if b":" not in body or b" " in body:
        with pytest.raises(BadMessage):
            came(Frame(Kind.HERE, bytes(TOKEN_BYTES) + body))


@pytest.mark.parametrize(
    ("end", "own", "relay", "near", "worth"),
    [
        (A, B, "45.77.9.9", False, True),
        (("10.2.0.2", 4002), B, "45.77.9.9", False, False),  # a relay that lies
        (("10.2.0.2", 4002), B, "45.77.9.9", True, False),  # likewise: this side is not in that network
        (("10.1.0.9", 4002), B, "45.77.9.9", True, True),  # in this very network
        (("10.1.0.9", 4002), B, "45.77.9.9", False, False),  # where a peer that was sought does not dial
        (("10.2.0.2", 4002), B, "10.1.0.2", False, True),  # as the relay is
        (("127.0.0.1", 4002), B, "45.77.9.9", True, False),
        (("127.0.0.1", 4002), B, "10.1.0.2", True, False),
        (("127.0.0.1", 4002), B, "127.0.0.1", False, True),
        (("45.77.1.2", 80), B, "45.77.9.9", False, False),
        (C, B, "45.77.9.9", False, False),  # IPv6 from an IPv4 port
        (B, B, "45.77.9.9", True, False),  # itself
    ],
)
def test_where_a_side_dials_because_a_relay_says_so(end: End, own: End, relay: str, near: bool, worth: bool) -> None:
    assert is_worth_dialling(end, own, relay, near=near) is worth
