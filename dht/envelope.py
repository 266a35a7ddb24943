"""The signed wrapping of every record: who says it, under which DHT key, until when. Pure: the time is passed in.

    raw      = msgpack [statement: bytes, public key: DER, signature]
    statement = msgpack [format, kind, key, sequence, expires_at, payload: bytes]

Everything that a node stores or a reader believes is inside the signature: the DHT key (a record cannot be moved to
another model), the expiry (it cannot be kept alive by others) and the sequence (older ones do not come back).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from dht.config import MAX_EXPIRY_S
from protocol.errors import BadRecord
from protocol.identity import peer_id_of, verify

if TYPE_CHECKING:
    from protocol.identity import Identity

# Messages of BadRecord hold nothing that a stranger chooses: readers count records by them.
FORMAT = 1
CONTEXT = b"potluck/1/record"
MAX_RAW_BYTES = 8 << 10
TOO_LARGE = f"the record is larger than {MAX_RAW_BYTES} bytes"
MAX_KEY_CHARS = 200
MAX_SEQUENCE = 2**63 - 1
"""A sequence is the nanosecond of issue, made to grow: comparable over restarts of a peer."""
UNPACK_LIMITS: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": MAX_RAW_BYTES,
    "max_bin_len": MAX_RAW_BYTES,
    "max_array_len": 4096,
    "max_map_len": 64,
    "max_ext_len": 0,
}


@dataclass(frozen=True)
class Envelope:
    """A statement whose signature was checked. `expires_at` is in seconds since 1970, `sequence` in nanoseconds."""

    signer: str
    kind: str
    key: str
    sequence: int
    expires_at: float
    payload: bytes


def seal(identity: Identity, *, kind: str, key: str, sequence: int, expires_at: float, payload: bytes) -> bytes:
    """Sign a statement as `identity`. About 1 ms.

    Raises:
        BadRecord: the result would break a limit that every reader holds.
    """
    statement = msgpack.packb([FORMAT, kind, key, sequence, float(expires_at), payload])
    raw = bytes(msgpack.packb([statement, identity.public_key_der, identity.sign(CONTEXT, statement)]))
    if len(raw) > MAX_RAW_BYTES:
        raise BadRecord(TOO_LARGE)
    return raw


def unseal(raw: object) -> Envelope:
    """Check size, form and signature of what `seal` made. Says nothing about the time: see `check_expiry`.

    Raises:
        BadRecord: it is anything else.
    """
    if not isinstance(raw, bytes):
        raise BadRecord("the record is not bytes")
    if len(raw) > MAX_RAW_BYTES:
        raise BadRecord(TOO_LARGE)
    statement, public_key, signature = _parts(unpack(raw), bytes, bytes, bytes)
    version, kind, key, sequence, expires_at, payload = _parts(unpack(statement), int, str, str, int, float, bytes)
    if version != FORMAT:
        raise BadRecord(f"the record's format is not {FORMAT}")
    if len(kind) > MAX_KEY_CHARS or len(key) > MAX_KEY_CHARS:
        raise BadRecord("the record's key is too long")
    if not 0 <= sequence <= MAX_SEQUENCE or not math.isfinite(expires_at):
        raise BadRecord("the record's sequence or expiry is out of range")
    signer = peer_id_of(public_key)
    verify(signer, public_key, CONTEXT, statement, signature)
    return Envelope(signer, kind, key, sequence, expires_at, payload)


def check_expiry(expires_at: float, now: float) -> None:
    """Raises:
    BadRecord: the record is expired, or claims to live longer than any may.
    """
    if expires_at <= now:
        raise BadRecord("the record is expired")
    if expires_at > now + MAX_EXPIRY_S:
        raise BadRecord(f"the record would live longer than {MAX_EXPIRY_S:.0f} s")


def unpack(data: bytes) -> object:
    """Msgpack within limits.

    Raises:
        BadRecord: the bytes are not exactly one object, or break a limit.
    """
    try:
        return msgpack.unpackb(data, **UNPACK_LIMITS)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError):
        raise BadRecord("the record does not unpack") from None


def _parts(value: object, *types: type) -> list[Any]:
    if not isinstance(value, list) or len(value) != len(types):
        raise BadRecord("the record's parts are not those of a record")
    # `type(...) is`: a bool is an int to isinstance
    if any(type(part) is not wanted for part, wanted in zip(value, types, strict=True)):
        raise BadRecord("a part of the record has the wrong type")
    return value
