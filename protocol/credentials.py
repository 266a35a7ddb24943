"""Who opens a session: a client's own key, and what it signs of each `Open`.

The key is Ed25519; the client's id is libp2p's for it (`12D3Koo...`), so that it is never taken for a peer's (`Qm...`).
It says nothing but "the same one as before": peers are fair per client by it, and may keep lists of ids. A signature
names the peer that it is for, so that no peer can open a session elsewhere in a client's name.

    <home>/client.key   Ed25519 private key in PEM, mode 0600

Source of the id's format: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
"""

from __future__ import annotations

import hmac
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import ConfigError, NotAdmitted
from protocol.identity import base58, write_private
from protocol.join_token import JoinToken
from protocol.limits import SIGNED_S
from protocol.messages import Open

log = logging.getLogger(__name__)

FILE = "client.key"

_DOMAIN = b"potluck/1/open"
_IDENTITY_MULTIHASH = b"\x00\x24\x08\x01\x12\x20"
"""The hash that hashes nothing, of 36 bytes: protobuf's field 1 (key_type) = 1 (Ed25519), then 32 bytes of data."""


@dataclass(frozen=True, slots=True)
class ClientKey:
    """A client's key. `repr` shows the id alone."""

    client_id: str
    public_key: bytes = field(repr=False)
    private_key: Ed25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def ephemeral(cls) -> ClientKey:
        """A new key in memory."""
        return _client_key(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, home: Path) -> ClientKey:
        """The key kept in `home`, made there if there is none. Where nothing can be kept it is a new one, and that is
        logged: peers then see a newcomer each time. Blocks on the disk.

        Raises:
            ConfigError: the file is damaged, or cannot be read.
        """
        path = home / FILE
        try:
            return _client_key(_parse(path.read_bytes(), path))
        except FileNotFoundError:
            key = Ed25519PrivateKey.generate()
        except OSError as error:
            raise ConfigError(f"the client's key {path} cannot be read: {error.strerror or error}") from error
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_private(path, pem, anew=True)
        except FileExistsError:  # another client began at the same moment
            return _client_key(_parse(path.read_bytes(), path))
        except OSError as error:
            log.warning("this client's key cannot be kept in %s: %s", home, error.strerror or error)
        return _client_key(key)


@dataclass(frozen=True, slots=True)
class Credentials:
    """With what a client opens sessions: its key, and its swarm's join token if that is private."""

    key: ClientKey
    token: JoinToken | None = None

    def sign(self, request: Open, peer_id: str, now: float) -> Open:
        """`request` as this peer takes it. `now`: seconds since 1970."""
        dated = replace(request, client_key=self.key.public_key, signed_at_ms=int(now * 1e3))
        proof = b"" if self.token is None else self.token.membership(peer_id, request.session_id, request.epoch)
        return replace(dated, signature=self.key.private_key.sign(_statement(dated, peer_id)), membership=proof)


def signer_of(request: Open, peer_id: str, now: float) -> str:
    """The id of the client that signed `request` for this peer; empty: nobody did. About 0.2 ms.

    Raises:
        NotAdmitted: the signature is wrong, for another peer, or too old.
    """
    if not request.client_key:
        return ""
    off_s = request.signed_at_ms / 1e3 - now
    if abs(off_s) > SIGNED_S:
        raise NotAdmitted(
            f"this client's clock is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} the peer's, or what it "
            "signed is old; synchronise the clock (e.g. `timedatectl set-ntp true`)"
        )
    try:
        Ed25519PublicKey.from_public_bytes(request.client_key).verify(request.signature, _statement(request, peer_id))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        raise NotAdmitted("the session's signature is wrong, or was made for another peer") from None
    return client_id_of(request.client_key)


def check_member(request: Open, peer_id: str, token: JoinToken) -> None:
    """Raises:
    NotAdmitted: whoever sent `request` does not know the token; the message says what to do.
    """
    if not request.membership:
        raise NotAdmitted("this swarm is private: give its join token (--join-token, POTLUCK_JOIN_TOKEN)")
    if not hmac.compare_digest(request.membership, token.membership(peer_id, request.session_id, request.epoch)):
        raise NotAdmitted("this swarm is private, and the join token is another one: give this swarm's (--join-token)")


def client_id_of(public_key: bytes) -> str:
    """The id of an Ed25519 public key of 32 bytes."""
    return base58(_IDENTITY_MULTIHASH + public_key)


def _client_key(key: Ed25519PrivateKey) -> ClientKey:
    public_key = key.public_key().public_bytes_raw()
    return ClientKey(client_id_of(public_key), public_key, key)


def _parse(data: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"the client's key {path} is damaged; restore it, or delete it to get a new one")
    return key


def _statement(request: Open, peer_id: str) -> bytes:
    """What is signed: nothing in it can be read in two ways, since all but the peer's id has a fixed length."""
    audience = peer_id.encode()
    numbers = (request.epoch, request.span.start, request.span.stop, request.signed_at_ms)
    return b"".join(
        (_DOMAIN, len(audience).to_bytes(2), audience, request.session_id, *(number.to_bytes(8) for number in numbers))
    )
