"""A join token: written down with a checksum, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRecord, ConfigError
from protocol.join_token import PREFIX, SECRET_BYTES, JoinToken, read_join_token
from protocol.limits import PROOF_BYTES, SESSION_ID_BYTES

TOKEN = JoinToken(bytes(range(SECRET_BYTES)))
TEXT = "potluck1-aaaqeayeaudaocajbifqydiob5gkvwo5"
SESSION = b"s" * SESSION_ID_BYTES


def test_its_text_stays_the_same() -> None:
    assert TOKEN.text == TEXT
    assert JoinToken.parse(TEXT) == TOKEN


def test_it_is_written_and_read() -> None:
    token = JoinToken.new()
    assert token != JoinToken.new()
    for text in (token.text, token.text.upper(), f"  {token.text}\n"):
        assert JoinToken.parse(text) == token
    assert token.secret.hex() not in repr(token) and "secret" not in repr(token)


@given(st.integers(len(PREFIX), len(TEXT) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567 019-"))
def test_a_mistake_is_noticed_and_not_shown(place: int, letter: str) -> None:
    wrong = TEXT[:place] + letter + TEXT[place + 1 :]
    if wrong == TEXT:
        return
    with pytest.raises(ConfigError, match="has a mistake") as caught:
        JoinToken.parse(wrong)
    assert wrong[len(PREFIX) :] not in caught.value.message


@pytest.mark.parametrize("text", ["", PREFIX, TEXT[:-1], TEXT + "a", TEXT.removeprefix(PREFIX), "potluck2" + TEXT[8:]])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ConfigError):
        JoinToken.parse(text)


def test_it_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TEXT + "\n")
    assert read_join_token(str(file)) == read_join_token(TEXT) == TOKEN
    assert read_join_token(None) is None and read_join_token(" ") is None


@pytest.mark.parametrize("content", ["", "nonsense", TEXT[:-2]])
def test_a_file_without_a_token(tmp_path: Path, content: str) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    with pytest.raises(ConfigError, match="has a mistake"):
        read_join_token(str(file))


@pytest.mark.parametrize("given", ["pot1uck-aaaqeayeaudaocaj", "/nowhere/token", "\0"])
def test_neither_a_token_nor_a_file(given: str) -> None:
    with pytest.raises(ConfigError, match="neither a token") as caught:
        read_join_token(given)
    assert given not in caught.value.message, "a token with a mistake at its beginning is a secret still"


def test_a_record_is_sealed_as_a_whole() -> None:
    sealed = TOKEN.seal(b"record")
    assert TOKEN.unseal(sealed) == b"record" and len(sealed) == len(b"record") + PROOF_BYTES
    broken = [
        bytes([sealed[0] ^ 1]) + sealed[1:],
        sealed[:-1],
        sealed + b"x",
        b"record",
        b"",
        JoinToken.new().seal(b"r"),
    ]
    for other in broken:
        with pytest.raises(BadRecord, match="no proof"):
            TOKEN.unseal(other)


def test_a_proof_is_for_one_session_on_one_peer() -> None:
    proofs = {
        TOKEN.membership("QmA", SESSION, 1),
        TOKEN.membership("QmB", SESSION, 1),
        TOKEN.membership("QmA", b"t" * SESSION_ID_BYTES, 1),
        TOKEN.membership("QmA", SESSION, 2),
        JoinToken.new().membership("QmA", SESSION, 1),
    }
    assert len(proofs) == 5 and {len(proof) for proof in proofs} == {PROOF_BYTES}


def test_the_swarms_name_says_nothing_of_the_secret() -> None:
    assert TOKEN.name == JoinToken.parse(TEXT).name != JoinToken.new().name
    assert TOKEN.name not in TOKEN.place("key") and TOKEN.secret.hex()[:8] not in TOKEN.name
