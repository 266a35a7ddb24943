"""What a peer stands by: digests of what it received and sent in each step, signed in batches.

A digest covers the payload as it crosses an edge, how it is to be read (names, codecs, dtypes, shapes), and after how
many tokens it comes. Both ends take it for themselves. It also rides on the step (`HopTrace`), for the client to
compare at once; what counts against a peer is what it signed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, BadRecord, PeerFault
from protocol.identity import Identity, verify
from protocol.limits import DIGEST_BYTES, MAX_COUNT, MAX_KEY_BYTES, MAX_LINES
from protocol.messages import TensorSpec

_CONTEXT = b"receipt"
_DOMAIN = b"potluck-step-1"


def digest(position: int, parts: Iterable[tuple[TensorSpec, bytes | memoryview]]) -> bytes:
    """Of a step's position and tensors, 16 bytes. A cropped part counts whole: crops come later, and change no byte."""
    state = hashlib.blake2b(position.to_bytes(8), digest_size=DIGEST_BYTES, person=_DOMAIN)
    for spec, payload in parts:
        state.update(repr((spec.name, spec.codec, spec.dtype, spec.shape, spec.nbytes)).encode())
        state.update(payload)
    return state.digest()


@dataclass(frozen=True, slots=True)
class Line:
    """One step at one peer: in which epoch it was computed, from what, and what came out, as digests."""

    step_id: int
    epoch: int
    received: bytes
    sent: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """Lines that a peer signed, for one session of its own."""

    lines: tuple[Line, ...]
    public_key: bytes
    signature: bytes

    @classmethod
    def signed(cls, lines: Iterable[Line], session_id: bytes, identity: Identity) -> Receipt:
        """By this peer. About 1 ms."""
        kept = tuple(lines)
        return cls(kept, identity.public_key_der, identity.sign(_CONTEXT, _body(session_id, kept)))

    def check(self, peer_id: str, session_id: bytes) -> None:
        """About 0.1 ms.

        Raises:
            PeerFault: that peer did not sign this for that session.
        """
        try:
            verify(peer_id, self.public_key, _CONTEXT, _body(session_id, self.lines), self.signature)
        except BadRecord as error:
            raise PeerFault(f"a receipt is not the peer's own: {error.message}", peer_id=peer_id) from None

    def to_proto(self) -> pb.InferReply:
        lines = [
            pb.ReceiptLine(step_id=line.step_id, epoch=line.epoch, received=line.received, sent=line.sent)
            for line in self.lines
        ]
        return pb.InferReply(receipt=pb.Receipt(lines=lines, public_key=self.public_key, signature=self.signature))

    @classmethod
    def from_proto(cls, message: pb.Receipt) -> Receipt:
        if len(message.lines) > MAX_LINES or max(len(message.public_key), len(message.signature)) > MAX_KEY_BYTES:
            raise BadMessage("a receipt is longer than any should be")
        return cls(tuple(_lines(message)), message.public_key, message.signature)


def _lines(message: pb.Receipt) -> Iterator[Line]:
    for line in message.lines:
        if not len(line.received) == len(line.sent) == DIGEST_BYTES or max(line.step_id, line.epoch) > MAX_COUNT:
            raise BadMessage("a receipt's line is none")
        yield Line(line.step_id, line.epoch, line.received, line.sent)


def _body(session_id: bytes, lines: Iterable[Line]) -> bytes:
    numbers = (struct.pack(">QQ", line.step_id, line.epoch) + line.received + line.sent for line in lines)
    return session_id + b"".join(numbers)
