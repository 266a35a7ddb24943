"""Every default of discovery, and where this machine keeps its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from protocol import settings
from protocol.errors import ConfigError
from protocol.hosts import is_loopback

ALL_INTERFACES = "0.0.0.0"  # noqa: S104  # a peer is there to be reached; 127.0.0.1 keeps a swarm on this machine

MAX_EXPIRY_S = 90.0
"""Nodes refuse records that live longer: garbage with a far expiry would push honest records out."""


@dataclass(frozen=True)
class DhtConfig:
    """How a process finds its swarm, announces itself and reads who serves what. Fields without help are internal.

    Raises:
        ConfigError: the port is none, or the expiry is one that other nodes would refuse.
    """

    join: tuple[str, ...] = field(
        default=(), metadata={"help": "Address of a node of the swarm, /ip4/HOST/tcp/PORT/p2p/ID; may be repeated."}
    )
    new_swarm: bool = field(default=False, metadata={"help": "Start a new swarm, even where one could be found."})
    join_token: str | None = field(
        default=None,
        metadata={"help": "Join token of a private swarm, or a file that holds it (which `ps` does not show)."},
    )
    host: str = field(default=ALL_INTERFACES, metadata={"help": "IP address on which the DHT node listens."})
    port: int = field(default=0, metadata={"help": "TCP port of the DHT node; 0: the one of last time, else any."})
    announce_host: str | None = field(
        default=None, metadata={"help": "Address under which others reach this node, if it is another (behind NAT)."}
    )
    bootstrap_list: str | None = field(
        default=None, metadata={"help": "File or HTTPS URL with one swarm address per line."}
    )
    home: str | None = field(
        default=None, metadata={"help": "Folder for identities, known peers and the state of running nodes."}
    )
    local: bool = field(default=True, metadata={"help": "Find a swarm that runs on this machine, and be found."})
    lan: bool = field(default=True, metadata={"help": "Find swarms on the local network, and be found (mDNS)."})
    announce_every_s: float = field(default=20.0, metadata={"help": "Seconds between two announcements."})
    refresh_every_s: float = field(default=5.0, metadata={"help": "Seconds between two reads of the swarm."})

    expiry_s: float = 60.0
    """After which a silent peer is forgotten."""
    announce_min_gap_s: float = 5.0
    """Between two announcements, unless the peer's state changes."""
    load_step: float = 0.25
    """Relative change of speed or free KV that is announced ahead of time."""
    replicas: int = 5
    """Nodes that hold each record."""
    reconnect_every_s: float = 10.0
    """Between two looks at the daemon and attempts to reach nodes that were lost."""

    start_timeout_s: float = 15.0
    """For the daemon to start and reach a first node."""
    join_timeout_s: float = 10.0
    """For the DHT to let this node in, afterwards."""
    rpc_timeout_s: float = 3.0
    """For one answer of one other node."""
    store_timeout_s: float = 10.0
    read_timeout_s: float = 10.0
    stop_timeout_s: float = 3.0
    """For the daemon to end before it is killed."""
    probe_timeout_s: float = 1.0
    """For a TCP connection to a node that was only heard of."""
    lan_timeout_s: float = 1.5
    fetch_timeout_s: float = 5.0
    """For the download of the bootstrap list."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"{self.port} is not a TCP port; choose one of 1 to 65535, or 0 for any")
        if not 0 < self.expiry_s < MAX_EXPIRY_S:
            raise ConfigError(f"records expire after more than 0 and less than {MAX_EXPIRY_S:.0f} s")

    @property
    def home_folder(self) -> Path:
        """`home`, else `$POTLUCK_HOME`, else the platform's place for user data. Nothing is created."""
        return Path(self.home).expanduser() if self.home else settings.home_folder()

    @property
    def is_loopback(self) -> bool:
        """Does the node listen for this machine only?"""
        return is_loopback(self.host)
