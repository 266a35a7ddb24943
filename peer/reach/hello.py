"""The server's name in a TLS ClientHello: all that a relay reads of what it carries. Pure.

gRPC names the peer's certificate there, and so the peer (`protocol.identity.certificate_name`). What follows is
ciphertext, to which the relay has no key.

Source of the format: RFC 8446 section 4.1.2 and RFC 6066 section 3.
"""

from __future__ import annotations

import re

from protocol.errors import BadMessage

HANDSHAKE = 22
CLIENT_HELLO = 1
SERVER_NAME = 0
HOST_NAME = 0
MAX_HELLO_BYTES = 8 << 10
"""gRPC's has 1,500. One that is longer is nobody's whom we serve."""

_NAME = re.compile(r"[a-z0-9.-]{1,255}")


def server_name(received: bytes) -> str | None:
    """The name that the client asks for; None: the hello has not arrived whole.

    Args:
        received: what came first on the connection.

    Raises:
        BadMessage: it is no ClientHello, one without a name, or longer than `MAX_HELLO_BYTES`.
    """
    hello = _handshake(received)
    if hello is None:
        if len(received) >= MAX_HELLO_BYTES:
            raise BadMessage("the TLS hello is too long")
        return None
    fields = _Bytes(hello)
    fields.take(2 + 32)  # version, random
    fields.vector(1)  # session id
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression methods
    extensions = _Bytes(fields.vector(2))
    while extensions.left:
        kind, body = extensions.number(2), extensions.vector(2)
        if kind == SERVER_NAME:
            return _host_name(body)
    raise BadMessage("the TLS hello names no server")


def _handshake(received: bytes) -> bytes | None:
    """The body of the ClientHello, which may be spread over several records; None: it is not whole."""
    message, at = bytearray(), 0
    while True:
        if len(received) > at and received[at] != HANDSHAKE:
            raise BadMessage("this is no TLS handshake")
        if len(received) < at + 5:
            return None
        nbytes = int.from_bytes(received[at + 3 : at + 5])
        if not nbytes:
            raise BadMessage("the TLS hello has an empty record")
        message += received[at + 5 : at + 5 + nbytes]
        at += 5 + nbytes
        if message[0] != CLIENT_HELLO if message else False:
            raise BadMessage("the TLS handshake begins without a hello")
        if len(message) >= 4:
            whole = int.from_bytes(message[1:4])
            if whole > MAX_HELLO_BYTES:
                raise BadMessage("the TLS hello is too long")
            if len(message) >= 4 + whole:
                return bytes(message[4 : 4 + whole])
        if len(received) < at:
            return None


def _host_name(body: bytes) -> str:
    names = _Bytes(_Bytes(body).vector(2))
    while names.left:
        kind, name = names.number(1), names.vector(2)
        if kind == HOST_NAME:
            text = name.decode("latin-1").lower()
            if _NAME.fullmatch(text):
                return text
            break
    raise BadMessage("the TLS hello names no host")


class _Bytes:
    """Read from the front; what ends too early is no hello."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise BadMessage("the TLS hello is cut short")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes))

    def vector(self, length_bytes: int) -> bytes:
        return self.take(self.number(length_bytes))
