"""Open files and sockets: how many this process may have, and how many of them strangers may take."""

from __future__ import annotations

import resource

from protocol.limits import MAX_CONNECTIONS

WANTED = 1 << 16
"""More than anything here needs; some systems allow a billion, and some programs close them all, one by one."""
SHARE = 0.75
"""Of all descriptors, that connections may take: weights, the DHT and connections to others need some too."""


def raise_limit() -> int:
    """Lets this process, and what it starts, open as many files as its user may, up to `WANTED`. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def connections_at_most() -> int:
    """Connections that a server of this process should accept at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, int(SHARE * soft))
