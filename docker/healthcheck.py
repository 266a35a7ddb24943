"""Is a container well? Exit code 0: yes.

python healthcheck.py http://127.0.0.1:8000/health          that address answers with a success
python healthcheck.py http://127.0.0.1:31340/metrics WORD   the same, and the answer contains WORD
python healthcheck.py 127.0.0.1:31330                       something listens there
"""

from __future__ import annotations

import socket
import sys
from urllib.request import urlopen

TIMEOUT_S = 4.0


def trouble(where: str, word: str = "") -> str:
    """What is wrong at `where`; empty: nothing."""
    try:
        if "://" not in where:
            host, _, port = where.rpartition(":")
            socket.create_connection((host, int(port)), TIMEOUT_S).close()
            return ""
        with urlopen(where, timeout=TIMEOUT_S) as answer:  # noqa: S310  # the operator's own address
            said = answer.read().decode(errors="replace")
    except OSError as error:  # urllib's errors are some, too
        return f"{where}: {error}"
    return "" if word in said else f"{where} does not say {word!r}"


if __name__ == "__main__":
    sys.exit(trouble(*sys.argv[1:]) or 0)
