"""The join token of a private swarm: one secret, from which follows all that tells members from others.

    potluck1-<base32 of 16 random bytes and 4 of their digest>

The secret itself never travels. Keys are derived from it (HKDF), one for each use: the places of records in the DHT,
the proof that each record carries, and the proof with which a session is opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocol.errors import BadRecord, ConfigError
from protocol.limits import PROOF_BYTES

PREFIX = "potluck1-"
SECRET_BYTES = 16
CHECK_BYTES = 4
NAME_BYTES = 8
MAX_FILE_BYTES = 1 << 10

NO_PROOF = "the record has no proof of the swarm's join token"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What members of a private swarm share. `repr` shows nothing of it; `text` is what people hand on."""

    secret: bytes = field(repr=False)

    @classmethod
    def new(cls) -> JoinToken:
        """Of a new private swarm."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token that `text` writes down.

        Raises:
            ConfigError: it is none, or has a mistake. The message shows nothing of it.
        """
        given = text.strip().lower()
        try:
            raw = base64.b32decode(given.removeprefix(PREFIX).upper())
        except (binascii.Error, ValueError):
            raw = b""
        secret, check = raw[:SECRET_BYTES], raw[SECRET_BYTES:]
        if not given.startswith(PREFIX) or len(raw) != SECRET_BYTES + CHECK_BYTES or check != _check(secret):
            raise ConfigError(
                f"the join token has a mistake: it is {PREFIX} and 32 letters and digits; copy it once more as a whole"
            )
        return cls(secret)

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        return PREFIX + base64.b32encode(self.secret + _check(self.secret)).decode().lower()

    @property
    def name(self) -> str:
        """Tells the swarm from others where it is looked for; says nothing of the secret."""
        return _key(self.secret, b"name")[:NAME_BYTES].hex()

    def place(self, key: str) -> str:
        """Under what the members keep the DHT records of `key`: others do not know where to look."""
        return f"{key}#{_key(self.secret, b'place').hex()}"

    def seal(self, record: bytes) -> bytes:
        """A signed record with the proof that its signer knows the token: bound to all of it, signature and key."""
        return record + self._proof(b"record", record)

    def unseal(self, sealed: bytes) -> bytes:
        """The record that `seal` was given.

        Raises:
            BadRecord: there is no proof, or one of another token.
        """
        record, proof = sealed[:-PROOF_BYTES], sealed[-PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._proof(b"record", record)):
            raise BadRecord(NO_PROOF)
        return record

    def membership(self, peer_id: str, session_id: bytes, epoch: int) -> bytes:
        """The proof with which a client opens this session on this peer. It is of no use anywhere else."""
        return self._proof(b"session", b"".join((peer_id.encode(), b"\0", session_id, epoch.to_bytes(8))))

    def _proof(self, purpose: bytes, body: bytes) -> bytes:
        return hmac.digest(_key(self.secret, purpose), body, "sha256")


def read_join_token(given: str | None) -> JoinToken | None:
    """The token that a setting gives: its text, or the path of a file that holds it. Blocks on the disk.

    Raises:
        ConfigError: it is neither, or the token has a mistake.
    """
    if given is None or not given.strip():
        return None
    if given.strip().lower().startswith(PREFIX):
        return JoinToken.parse(given)
    try:
        with Path(given).expanduser().open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode("ascii", errors="replace")
    except (OSError, ValueError):
        # Not shown: it may be a token after all, with a mistake at its beginning.
        raise ConfigError(
            f"--join-token is neither a token ({PREFIX}...) nor a file that can be read; "
            "make a token with `potluck join-token`"
        ) from None
    return JoinToken.parse(text)


def _check(secret: bytes) -> bytes:
    return hashlib.sha256(b"potluck/1/token" + secret).digest()[:CHECK_BYTES]


@lru_cache(maxsize=64)
def _key(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), PROOF_BYTES, salt=None, info=b"potluck/1/" + purpose).derive(secret)
