"""Identities: hivemind's peer ids, signatures, files that survive damage or say so, one process at a time."""

from __future__ import annotations

import contextlib
import datetime
import os
import stat
import subprocess
import sys
from pathlib import Path

import base58
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from protocol import identity as module
from protocol.errors import BadRecord, ConfigError
from protocol.identity import (
    Identity,
    certificate_name,
    claim_identity,
    common_name,
    load_certificate,
    peer_id_of,
    verify,
)

CONTEXT, BODY = b"a context", b"a body"


@pytest.fixture(scope="module")
def identity() -> Identity:
    return Identity.ephemeral()


@pytest.fixture(scope="module")
def other() -> Identity:
    return Identity.ephemeral()


def spki(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_hivemind_derives_the_same_peer_id_from_our_key_file(tmp_path: Path) -> None:
    from hivemind.p2p import PeerID

    identity = Identity.load_or_create(tmp_path)
    assert PeerID.from_identity((tmp_path / "peer.key").read_bytes()).to_base58() == identity.peer_id


def test_a_key_file_made_by_hivemind_is_read(tmp_path: Path) -> None:
    from hivemind.p2p import P2P, PeerID

    P2P.generate_identity(str(tmp_path / "peer.key"))
    expected = PeerID.from_identity((tmp_path / "peer.key").read_bytes()).to_base58()
    assert Identity.load_or_create(tmp_path).peer_id == expected


def test_an_identity_stays_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "down"
    first, second = Identity.load_or_create(folder), Identity.load_or_create(folder)
    assert (first.peer_id, first.certificate_pem) == (second.peer_id, second.certificate_pem)
    assert peer_id_of(first.public_key_der) == first.peer_id


def test_only_the_owner_can_read_the_keys(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path)
    for name in ("peer.key", "tls.pem"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peer.key", "tls.pem"]


def test_keys_are_not_shown(identity: Identity) -> None:
    assert repr(identity) == f"Identity(peer_id={identity.peer_id!r})"


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:40], lambda data: data + b"x", lambda data: b"x"]
)
def test_a_damaged_key_file_is_an_error_that_names_it_and_keeps_it(tmp_path: Path, damage: object) -> None:
    Identity.load_or_create(tmp_path)
    path = tmp_path / "peer.key"
    damaged = damage(path.read_bytes())  # type: ignore[operator]
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"peer\.key is damaged"):
        Identity.load_or_create(tmp_path)
    assert path.read_bytes() == damaged


@given(st.binary(max_size=400))
def test_any_bytes_as_a_key_file_are_a_key_or_an_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        module._parse_private_key(data, Path("peer.key"))


def test_an_unusable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        Identity.load_or_create(tmp_path / "file")


def test_a_damaged_certificate_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = Identity.load_or_create(tmp_path)
    (tmp_path / "tls.pem").write_bytes(before.tls_key_pem + b"garbage")
    after = Identity.load_or_create(tmp_path)
    assert after.peer_id == before.peer_id and after.certificate_pem != before.certificate_pem
    assert "making a new one" in caplog.text
    assert Identity.load_or_create(tmp_path).certificate_pem == after.certificate_pem


def test_an_old_certificate_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Identity.load_or_create(tmp_path)
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=module.CERTIFICATE_DAYS - 30)
    monkeypatch.setattr(module, "_now", lambda: later)
    after = Identity.load_or_create(tmp_path)
    assert after.certificate_pem != before.certificate_pem
    assert x509.load_pem_x509_certificate(after.certificate_pem).not_valid_after_utc > later


def test_another_peers_certificate_is_replaced(tmp_path: Path, other: Identity) -> None:
    Identity.load_or_create(tmp_path)
    (tmp_path / "tls.pem").write_bytes(other.tls_key_pem + other.certificate_pem)
    assert Identity.load_or_create(tmp_path).certificate_pem != other.certificate_pem


def test_the_certificate_names_the_peer(identity: Identity) -> None:
    certificate = load_certificate(identity.certificate_der)
    assert common_name(certificate) == certificate_name(identity.peer_id)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [certificate_name(identity.peer_id)]


@given(st.binary(max_size=600))
def test_any_bytes_as_a_certificate_are_a_bad_record(data: bytes) -> None:
    with pytest.raises(BadRecord):
        load_certificate(data)


# cryptography reads certificates that it finds odd, and says so.
@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive", "ignore:Attribute's length must be")
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_mutated_certificate_parses_or_is_a_bad_record(position: int, flip: int) -> None:
    data = bytearray(CERTIFICATE)
    data[position % len(data)] ^= flip
    with contextlib.suppress(BadRecord):
        common_name(load_certificate(bytes(data)))


CERTIFICATE = Identity.ephemeral().certificate_der


def test_a_signature_is_believed(identity: Identity) -> None:
    verify(identity.peer_id, identity.public_key_der, CONTEXT, BODY, identity.sign(CONTEXT, BODY))


def test_no_other_signature_is(identity: Identity, other: Identity) -> None:
    good = identity.sign(CONTEXT, BODY)
    peer, key = identity.peer_id, identity.public_key_der
    for arguments in [
        (peer, key, b"another context", BODY, good),
        (peer, key, CONTEXT, b"another body", good),
        (peer, key, CONTEXT + BODY[:1], BODY[1:], good),  # the border between the two is signed too
        (peer, key, CONTEXT, BODY, other.sign(CONTEXT, BODY)),
        (peer, key, CONTEXT, BODY, b""),
        (peer, key, CONTEXT, BODY, good + b"x"),
        (peer, other.public_key_der, CONTEXT, BODY, other.sign(CONTEXT, BODY)),
        (other.peer_id, key, CONTEXT, BODY, good),
        (peer, b"no key", CONTEXT, BODY, good),
    ]:
        with pytest.raises(BadRecord):
            verify(*arguments)


def test_keys_that_are_slow_to_verify_are_refused() -> None:
    for key in (
        rsa.generate_private_key(3, 2048),
        rsa.generate_private_key(65537, 1024),
        ec.generate_private_key(ec.SECP256R1()),
    ):
        public = spki(key.public_key())
        with pytest.raises(BadRecord, match="public key"):
            verify(peer_id_of(public), public, CONTEXT, BODY, b"")


@given(st.binary(max_size=80), st.binary(max_size=400), st.binary(max_size=300))
def test_any_bytes_as_key_and_signature_are_a_bad_record(body: bytes, key: bytes, signature: bytes) -> None:
    with pytest.raises(BadRecord):
        verify(peer_id_of(key), key, CONTEXT, body, signature)


@given(st.binary(max_size=64))
def test_base58_is_bitcoins(data: bytes) -> None:
    assert module.base58(data) == base58.b58encode(data).decode()


def test_an_ephemeral_identity_leaves_no_file(identity: Identity) -> None:
    from hivemind.p2p import PeerID

    with identity.key_file() as path:
        assert PeerID.from_identity(path.read_bytes()).to_base58() == identity.peer_id
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.parent.exists()


def test_each_claim_gets_its_own_identity(tmp_path: Path) -> None:
    with claim_identity(tmp_path) as first, claim_identity(tmp_path) as second:
        assert first.peer_id != second.peer_id
        assert second.folder == tmp_path / "identity-1"
    with claim_identity(tmp_path) as again:
        assert again.peer_id == first.peer_id


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from protocol.identity import claim_identity\n"
        "with claim_identity(pathlib.Path(sys.argv[1])) as identity:\n"
        "    print(identity.peer_id, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        try:
            assert holder.stdout is not None
            held = holder.stdout.readline().strip()
            with claim_identity(tmp_path) as mine:
                assert mine.peer_id != held
        finally:
            os.kill(holder.pid, 9)
            holder.wait(10)
    with claim_identity(tmp_path) as freed:
        assert freed.peer_id == held


def test_a_full_host_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_IDENTITIES_PER_HOST", 1)
    with claim_identity(tmp_path), pytest.raises(ConfigError, match="in use"), claim_identity(tmp_path):
        pytest.fail("two claims of one identity")
