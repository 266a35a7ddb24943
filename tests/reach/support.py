"""What tests of reachability share."""

from __future__ import annotations

import contextlib
import ssl


def hello_of(name: str) -> bytes:
    """What OpenSSL says first."""
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()
