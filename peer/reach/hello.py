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


class HelloReader:
    """Finds the name while the hello arrives. Each record is read once: thousands of tiny ones would cost seconds."""

    def __init__(self) -> None:
        self._message = bytearray()  # of the records that are whole
        self._at = 0  # where the next one begins

    def name(self, received: bytes | bytearray) -> str | None:
        """The name that the client asks for; None: the hello has not arrived whole.

        Args:
            received: all that has come on the connection so far.

        Raises:
            BadMessage: it is no ClientHello, one without a name, or longer than `MAX_HELLO_BYTES`.
        """
        hello = self._whole(received)
        if hello is not None:
            return _name_in(hello)
        if len(received) >= MAX_HELLO_BYTES:
            raise BadMessage("the TLS hello is too long")
        return None

    def _whole(self, received: bytes | bytearray) -> bytes | None:
        """The body of the ClientHello, which may be spread over several records; None: it is not whole."""
        while True:
            at = self._at
            if len(received) > at and received[at] != HANDSHAKE:
                raise BadMessage("this is no TLS handshake")
            if len(received) < at + 5:
                return None
            nbytes = int.from_bytes(received[at + 3 : at + 5])
            if not nbytes:
                raise BadMessage("the TLS hello has an empty record")
            came = received[at + 5 : at + 5 + nbytes]
            if len(came) < nbytes:
                return _body(bytes(self._message + came))
            self._message += came
            self._at += 5 + nbytes
            hello = _body(self._message)
            if hello is not None:
                return hello


def server_name(received: bytes) -> str | None:
    """The name in what came first on a connection, as `HelloReader.name` has it.

    Raises:
        BadMessage: likewise.
    """
    return HelloReader().name(received)


def _body(message: bytes | bytearray) -> bytes | None:
    """What the handshake's first message says; None: it is not whole."""
    if message and message[0] != CLIENT_HELLO:
        raise BadMessage("the TLS handshake begins without a hello")
    if len(message) < 4:
        return None
    whole = int.from_bytes(message[1:4])
    if whole > MAX_HELLO_BYTES:
        raise BadMessage("the TLS hello is too long")
    return bytes(message[4 : 4 + whole]) if len(message) >= 4 + whole else None


def _name_in(hello: bytes) -> str:
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
