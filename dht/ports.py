"""On which TCP port a DHT node listens.

p2pd shares ports (SO_REUSEPORT): on a taken one it starts all the same, and gets half of the other's connections. So
whoever wants a port looks first whether it is free.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from pathlib import Path

from dht.config import DhtConfig
from protocol.errors import ConfigError
from protocol.identity import write_private

FILE = "dht-port"


def choose(config: DhtConfig, folder: Path | None) -> int:
    """The configured port, else the one that the identity in `folder` had last time, else any that is free.

    Raises:
        ConfigError: the configured port is taken, or the host is not an address of this machine.
    """
    if config.port:
        return bind(config.host, config.port)
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, ConfigError):
            return bind(config.host, int((folder / FILE).read_text()))
    return bind(config.host, 0)


def remember(folder: Path, port: int) -> None:
    """Note the port, for `choose` after a restart.

    Raises:
        OSError: the folder cannot be written.
    """
    write_private(folder / FILE, str(port).encode())


def bind(host: str, port: int) -> int:
    """Take the port (0: any) and let go of it; gives its number.

    Raises:
        ConfigError: it is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        raise ConfigError(
            f"{host!r} is not an IP address; use e.g. 0.0.0.0 for all of this machine's, or 127.0.0.1"
        ) from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OverflowError:
            raise ConfigError(f"{port} is not a TCP port") from None
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
        return int(probe.getsockname()[1])
