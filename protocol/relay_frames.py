"""What relays and the peers that they serve say to each other. Pure: bytes in, frames out.

    peer   REGISTER                    relay      one connection that the peer keeps
           CHALLENGE(nonce)        ◄──
           PROOF(key, signature)   ──►
           WELCOME(host)           ◄──            where the relay sees the peer
           PING / PONG             ──► ◄──
           DIAL(token)             ◄──            a client wants the peer
           DATA(token)             ──►            another connection, which then carries that client's bytes

Two that would rather do without the relay meet at it, each with a connection from the port that it will use then:

    client SEEK(name)              ──►
    peer   SOUGHT(token)           ◄──            on the connection that it keeps
           HERE(token, own end)    ──►            another one
    both   MEET(ends)              ◄──            where each is, as the relay sees it; see `protocol.meeting`

The peer is told nothing of the client but what the relay sees of it: it dials no address that a client named.

A frame is its kind (one byte), the length of its body (two) and the body. No kind is 22, with which TLS begins, so that
one port takes peers and clients.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protocol.errors import BadMessage
from protocol.hosts import address, host_of, ip
from protocol.identity import Identity, peer_id_of, verify

MAX_BODY_BYTES = 2 << 10
NONCE_BYTES = 32
TOKEN_BYTES = 16
HEAD_BYTES = 3
CONTEXT = b"relay-registration"
MAX_ENDS = 4  # in a MEET, one's own among them

End = tuple[str, int]
"""Where a connection begins or ends: IP address (or, where one dials, a name) and port."""


class Kind(enum.IntEnum):
    """What a frame says."""

    REGISTER = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    PING = 6
    PONG = 7
    DIAL = 8
    DATA = 9
    SEEK = 10
    SOUGHT = 11
    HERE = 12
    MEET = 13


_BODY_BYTES = {
    Kind.REGISTER: 0,
    Kind.CHALLENGE: NONCE_BYTES,
    Kind.PING: 0,
    Kind.PONG: 0,
    Kind.DIAL: TOKEN_BYTES,
    Kind.DATA: TOKEN_BYTES,
    Kind.SOUGHT: TOKEN_BYTES,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: Kind
    body: bytes = b""

    def encode(self) -> bytes:
        return bytes([self.kind]) + len(self.body).to_bytes(2) + self.body

    @property
    def text(self) -> str:
        """The body as text, to be shown."""
        return "".join(c for c in self.body.decode("utf-8", "replace") if c.isprintable())


class FrameReader:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> None:
        """Takes what has arrived."""
        self._received += data

    def frames(self) -> Iterator[Frame]:
        """The frames that are whole, each once; may be left before the end, for the rest to be `rest`.

        Raises:
            BadMessage: what has arrived is no frame.
        """
        while len(self._received) >= HEAD_BYTES:
            nbytes = int.from_bytes(self._received[1:HEAD_BYTES])
            try:
                kind = Kind(self._received[0])
            except ValueError:
                raise BadMessage(f"{self._received[0]} is no kind of frame") from None
            if nbytes > MAX_BODY_BYTES or nbytes != _BODY_BYTES.get(kind, nbytes):
                raise BadMessage(f"a frame of kind {kind.name} has no {nbytes} bytes")
            if len(self._received) < HEAD_BYTES + nbytes:
                return
            body = bytes(self._received[HEAD_BYTES : HEAD_BYTES + nbytes])
            del self._received[: HEAD_BYTES + nbytes]
            yield Frame(kind, body)

    @property
    def rest(self) -> bytes:
        """What has arrived after the frames that were read."""
        return bytes(self._received)


def proof(identity: Identity, relay_id: str, nonce: bytes) -> Frame:
    """Shows the relay `relay_id`, which gave `nonce`, who registers. About 1 ms."""
    key = identity.public_key_der
    return Frame(Kind.PROOF, len(key).to_bytes(2) + key + identity.sign(CONTEXT, _signed(relay_id, nonce)))


def proven(frame: Frame, relay_id: str, nonce: bytes) -> str:
    """The id of the peer that gave this proof.

    Raises:
        BadMessage: it proves nothing.
        BadRecord: likewise; its key or signature is wrong.
    """
    if frame.kind is not Kind.PROOF:
        raise BadMessage(f"{frame.kind.name} came where a proof was due")
    nbytes = int.from_bytes(frame.body[:2])
    key, signature = frame.body[2 : 2 + nbytes], frame.body[2 + nbytes :]
    if len(key) != nbytes or not signature:
        raise BadMessage("the proof is cut short")
    peer_id = peer_id_of(key)
    verify(peer_id, key, CONTEXT, _signed(relay_id, nonce), signature)
    return peer_id


def _signed(relay_id: str, nonce: bytes) -> bytes:
    """Names the relay, so that none can register elsewhere in the name of those that register with it."""
    return relay_id.encode() + b"\0" + nonce


# ---------------------------------------------------------------------------- meetings


def seek(name: str) -> Frame:
    """Asks for a meeting with the peer of that name."""
    return Frame(Kind.SEEK, name.encode())


def sought(frame: Frame) -> str:
    """What `seek` was told.

    Raises:
        BadMessage: it is malformed.
    """
    return _ascii(frame.body)


def here(token: bytes, own: End) -> Frame:
    """Comes to the meeting of that token.

    Args:
        own: where the peer is, as its own machine sees it: of use to a client in the same network.
    """
    return Frame(Kind.HERE, token + address(*own).encode())


def came(frame: Frame) -> tuple[bytes, End]:
    """What `here` was told.

    Raises:
        BadMessage: it is malformed.
    """
    return frame.body[:TOKEN_BYTES], _end(_ascii(frame.body[TOKEN_BYTES:]))


def meet(own: End, others: Sequence[End]) -> Frame:
    """Tells one of two where it is seen itself, and at which ends the other may be."""
    return Frame(Kind.MEET, " ".join(address(*end) for end in (own, *others)).encode())


def met(frame: Frame) -> tuple[End, tuple[End, ...]]:
    """What `meet` was told.

    Raises:
        BadMessage: it is malformed.
    """
    words = _ascii(frame.body).split(" ")
    if frame.kind is not Kind.MEET or not 2 <= len(words) <= MAX_ENDS:
        raise BadMessage("no meeting is said like this")
    own, *others = map(_end, words)
    return own, tuple(others)


def _ascii(body: bytes) -> str:
    try:
        return body.decode("ascii")
    except UnicodeDecodeError:
        raise BadMessage("a frame holds what is no text") from None


def _end(text: str) -> End:
    host, _, port = text.rpartition(":")
    found = ip(host_of(text))
    if found is None or not port.isdecimal() or len(port) > 5 or not 1 <= int(port) <= 65535:
        raise BadMessage(f"{host[:64]!r} is no address with a port")
    return str(found), int(port)
