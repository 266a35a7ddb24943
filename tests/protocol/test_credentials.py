"""A client's key, and what it signs: for one peer, one session, one epoch, about now."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.credentials import FILE, ClientKey, Credentials, check_member, client_id_of, signer_of
from protocol.errors import BadMessage, ConfigError, NotAdmitted
from protocol.join_token import JoinToken
from protocol.limits import SESSION_ID_BYTES, SIGNED_S
from protocol.messages import Open
from protocol.span import Span

NOW = 1_800_000_000.0
KEY = ClientKey.ephemeral()
TOKEN = JoinToken.new()
REQUEST = Open(b"s" * SESSION_ID_BYTES, 3, "f" * 32, Span(4, 9), "int8", 1, 64)
SIGNED = Credentials(KEY).sign(REQUEST, "QmPeer", NOW)


def test_an_id_is_libp2ps_of_the_key() -> None:
    assert KEY.client_id == client_id_of(KEY.public_key)
    # From libp2p's own list of test vectors.
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    assert client_id_of(public) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    assert KEY.client_id in repr(KEY) and "private" not in repr(KEY)


def test_the_signer_is_known() -> None:
    assert signer_of(SIGNED, "QmPeer", NOW) == KEY.client_id
    assert signer_of(Open.from_proto(SIGNED.to_proto().open), "QmPeer", NOW + 5) == KEY.client_id
    assert signer_of(REQUEST, "QmPeer", NOW) == "", "older clients sign nothing"


@pytest.mark.parametrize(
    "forged",
    [
        replace(SIGNED, session_id=b"t" * SESSION_ID_BYTES),
        replace(SIGNED, epoch=4),
        replace(SIGNED, span=Span(4, 10)),
        replace(SIGNED, span=Span(3, 9)),
        replace(SIGNED, signed_at_ms=SIGNED.signed_at_ms + 1),
        replace(SIGNED, client_key=ClientKey.ephemeral().public_key),
        replace(SIGNED, client_key=b"\xff" * 32),
        replace(SIGNED, signature=bytes(64)),
    ],
)
def test_what_was_not_signed_is_refused(forged: Open) -> None:
    with pytest.raises(NotAdmitted, match="signature is wrong"):
        signer_of(forged, "QmPeer", NOW)


def test_a_signature_is_for_one_peer() -> None:
    with pytest.raises(NotAdmitted, match="another peer"):
        signer_of(SIGNED, "QmPeer2", NOW)


@pytest.mark.parametrize(("off_s", "words"), [(SIGNED_S + 1, "behind"), (-SIGNED_S - 1, "ahead of")])
def test_a_signature_is_of_about_now(off_s: float, words: str) -> None:
    assert signer_of(SIGNED, "QmPeer", NOW + off_s * 0.99)
    with pytest.raises(NotAdmitted, match=f"601 s {words}.*synchronise"):
        signer_of(SIGNED, "QmPeer", NOW + off_s)


@pytest.mark.parametrize(
    "changes",
    [
        {"client_key": b"short"},
        {"signature": b""},
        {"client_key": b""},
        {"membership": b"short"},
        {"signed_at_ms": 1 << 63},
    ],
)
def test_sizes_are_checked_before_anything_else(changes: dict[str, object]) -> None:
    with pytest.raises(BadMessage):
        Open.from_proto(replace(SIGNED, **changes).to_proto().open)  # type: ignore[arg-type]


def test_members_of_a_private_swarm_show_it() -> None:
    check_member(Credentials(KEY, TOKEN).sign(REQUEST, "QmPeer", NOW), "QmPeer", TOKEN)
    with pytest.raises(NotAdmitted, match=r"private: give its join token \(--join-token"):
        check_member(SIGNED, "QmPeer", TOKEN)
    for token, peer_id in ((JoinToken.new(), "QmPeer"), (TOKEN, "QmOther")):
        with pytest.raises(NotAdmitted, match="another one"):
            check_member(Credentials(KEY, token).sign(REQUEST, peer_id, NOW), "QmPeer", TOKEN)


def test_a_key_is_kept(tmp_path: Path) -> None:
    key = ClientKey.load_or_create(tmp_path / "home")
    assert ClientKey.load_or_create(tmp_path / "home") == key != ClientKey.load_or_create(tmp_path / "other")
    assert (tmp_path / "home" / FILE).stat().st_mode & 0o777 == 0o600


def test_clients_that_begin_at_once_have_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: ClientKey.load_or_create(tmp_path / "home").client_id, range(8)))
    assert len(keys) == 1
    assert [file.name for file in (tmp_path / "home").iterdir()] == [FILE]


def test_a_damaged_key_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="is damaged; restore it, or delete it"):
        ClientKey.load_or_create(tmp_path)


def test_without_a_place_to_keep_it_there_is_a_key_still(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes, *, anew: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("protocol.credentials.write_private", full)
    with caplog.at_level(logging.WARNING):
        assert ClientKey.load_or_create(tmp_path) != ClientKey.load_or_create(tmp_path)
    assert "cannot be kept" in caplog.text and "No space left" in caplog.text
    (tmp_path / "home").write_text("a file, where a folder should be")
    with pytest.raises(ConfigError, match="cannot be read"):
        ClientKey.load_or_create(tmp_path / "home")
