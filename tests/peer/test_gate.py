"""Who may open a session, and on whose account."""

from __future__ import annotations

from pathlib import Path

import pytest

from peer.accounts import Accounts
from peer.config import PeerConfig
from peer.gate import CLIENT, PEER, Entry, Gate, Lists
from protocol.credentials import ClientKey, Credentials
from protocol.errors import ConfigError, NotAdmitted, PeerFull
from protocol.join_token import JoinToken
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import Open
from protocol.span import Span

NOW = 1_800_000_000.0
FRIEND, STRANGER = ClientKey.ephemeral(), ClientKey.ephemeral()
TOKEN = JoinToken.new()
OPEN = Open(b"s" * SESSION_ID_BYTES, 1, "f" * 32, Span(0, 4), "none", 1, 64)
HERE = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
THERE = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"


def gate(entry: Entry | None = None, **settings: float) -> Gate:
    return Gate(HERE, Accounts(PeerConfig(**settings).allowance), entry or Entry())  # type: ignore[arg-type]


def admitted(one: Gate, request: Open, connection: str = "ipv4:192.0.2.7:5000") -> str:
    """On whose account."""
    return one.admit(request, connection, 0.0, NOW).name


def signed(key: ClientKey = FRIEND, token: JoinToken | None = None, peer_id: str = HERE) -> Open:
    return Credentials(key, token).sign(OPEN, peer_id, NOW)


def test_an_open_peer_takes_everybody_on_their_own_account() -> None:
    one = gate()
    assert admitted(one, signed()) == FRIEND.client_id
    assert admitted(one, OPEN) == "192.0.2.7", "who signs nothing is an address"


def test_who_signed_for_another_peer_is_nobody() -> None:
    with pytest.raises(NotAdmitted, match="another peer"):
        admitted(gate(), signed(peer_id=THERE))


def test_a_private_swarm_takes_members_alone() -> None:
    one = gate(Entry(TOKEN))
    assert admitted(one, signed(token=TOKEN)) == FRIEND.client_id
    with pytest.raises(NotAdmitted, match=r"give its join token \(--join-token"):
        admitted(one, signed())
    with pytest.raises(NotAdmitted, match="another one"):
        admitted(one, signed(token=JoinToken.new()))


def test_lists_of_clients() -> None:
    allowing = gate(Entry(lists=Lists.of([FRIEND.client_id], [])))
    assert admitted(allowing, signed()) == FRIEND.client_id
    with pytest.raises(NotAdmitted, match=f"ask its operator to allow {STRANGER.client_id}"):
        admitted(allowing, signed(STRANGER))
    with pytest.raises(NotAdmitted, match="signs nothing"):
        admitted(allowing, OPEN)
    denying = gate(Entry(lists=Lists.of([], [STRANGER.client_id])))
    assert admitted(denying, signed()) and admitted(denying, OPEN)
    with pytest.raises(NotAdmitted):
        admitted(denying, signed(STRANGER))


def test_lists_of_one_kind_say_nothing_of_the_other() -> None:
    lists = Lists.of([HERE], [])
    assert lists.permit(HERE, PEER) and not lists.permit(THERE, PEER)
    assert lists.permit(FRIEND.client_id, CLIENT)
    both = Lists.of([HERE, FRIEND.client_id], [HERE])
    assert not both.permit(HERE, PEER), "what is denied is denied"
    assert both.permit(FRIEND.client_id, CLIENT) and not both.permit(STRANGER.client_id, CLIENT)


@pytest.mark.parametrize("name", ["", "DWjhx5N", "12D3Koo", HERE[:-1], f"{HERE[:-2]}/x", "x" * 50])
def test_lists_take_whole_ids(name: str) -> None:
    for flag, lists in (("--allow", ([name], [])), ("--deny", ([], [name]))):
        with pytest.raises(ConfigError, match=f"{flag} takes whole ids"):
            Lists.of(*lists)


def test_lists_come_from_files_too(tmp_path: Path) -> None:
    file = tmp_path / "friends"
    file.write_text(f"# friends\n\n{FRIEND.client_id}  # Zoë\n{THERE}\n")
    entry = Entry.read(TOKEN.text, [f"@{file}", HERE], [])
    assert entry == Entry(TOKEN, Lists(frozenset({FRIEND.client_id, HERE, THERE})))
    with pytest.raises(ConfigError, match=r"--deny @.*/absent: the file cannot be read: No such file"):
        Entry.read(None, [], [f"@{tmp_path}/absent"])


def test_opening_too_often_is_refused_and_says_when_to_come_again() -> None:
    one = gate(client_opens_per_s=4.0)
    for _ in range(PeerConfig().client_opens_at_once):
        admitted(one, signed())
    with pytest.raises(PeerFull) as caught:
        admitted(one, signed())
    assert caught.value.retry_after_s == 0.25
    assert admitted(one, signed(STRANGER)) == STRANGER.client_id, "others are not refused for that"
