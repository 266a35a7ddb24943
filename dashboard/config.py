"""What the health page can be told, and the defaults: flags, `POTLUCK_*` variables, the file's [dashboard] table."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from dht.maddr import Maddr
from protocol.errors import ConfigError
from protocol.hosts import is_loopback

SECTION = "dashboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardConfig:
    """Which swarm is shown, where, and how closely it is watched. Fields without help are internal.

    Raises:
        ConfigError: a value is out of range, or what all would see holds an IP address.
    """

    join: tuple[str, ...] = field(
        default=(), metadata={"help": "Address of a peer or bootstrap node of the swarm; may be repeated."}
    )
    join_token: str | None = field(
        default=None,
        metadata={"help": "Join token of a private swarm, or a file that holds it (which `ps` does not show)."},
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "IP address to show the page at; 0.0.0.0: to everybody who reaches it."}
    )
    port: int = field(default=8330, metadata={"help": "TCP port of the page; 0 picks a free one."})
    title: str = field(default="Potluck", metadata={"help": "What the page calls the swarm."})
    public_join: str | None = field(
        default=None,
        metadata={
            "help": "The address by which newcomers are told to join, by name: /dns/HOST/tcp/PORT/p2p/ID. Not given:"
            " that of --join, if it has a name. The page shows no IP addresses."
        },
    )
    history: str | None = field(
        default=None, metadata={"help": "File of the history (SQLite). Not given: one in Potluck's home folder."}
    )
    probe_every_s: float = field(default=1.5, metadata={"help": "Seconds between two rounds of asking peers."})
    probe_peers: int = field(
        default=50, metadata={"help": "All peers are asked in each round if they are so many at most, else a sample."}
    )

    probe_timeout_s: float = 1.0
    """For a peer that has answered before: so soon a silent one is noticed."""
    first_probe_timeout_s: float = 4.0
    """For one that has not: connecting takes several round trips."""
    probes_at_once: int = 25
    sample_every_s: float = 30.0
    """Between two entries of the history."""
    keep_days: float = 30.0
    history_models: int = 16
    """A swarm of strangers can list hundreds: the history keeps those with most peers."""
    events_kept: int = 500
    news_every_s: float = 0.5
    """Between two looks whether viewers have to be told something."""
    keep_alive_s: float = 15.0
    """Of the live stream, when there is no news."""
    max_viewers: int = 256
    """With an open live stream; the page of others still shows how it was when it was loaded."""
    stale_after_s: float = 60.0
    """A view of the swarm that is older makes /health fail."""
    find_again_s: float = 5.0
    """Between two attempts to find a swarm that is not there."""
    stop_timeout_s: float = 2.0
    """For open connections, when the page is stopped."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"{self.port} is not a TCP port; choose one of 1 to 65535, or 0 for any")
        for name in ("probe_every_s", "probe_peers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for text in self.join:
            Maddr.require(text)
        if not 1 <= len(self.title) <= 80:
            raise ConfigError("--title has 1 to 80 characters")
        if self.public_join is not None and not has_name(Maddr.require(self.public_join)):
            raise ConfigError(f"--public-join is shown to everybody, and must not hold an IP address: {EXAMPLE}")

    @property
    def is_private(self) -> bool:
        """Is the page there for this machine only?"""
        return is_loopback(self.host)

    @property
    def shown_join(self) -> str | None:
        """The address by which newcomers join; None: there is none that may be shown."""
        given = (self.public_join,) if self.public_join is not None else self.join
        return next((text for text in given if has_name(Maddr.require(text))), None)


EXAMPLE = "/dns/swarm.example.org/tcp/31330/p2p/Qm..."


def has_name(maddr: Maddr) -> bool:
    """Does the address name its host, instead of giving its IP address?"""
    try:
        ipaddress.ip_address(maddr.host)
    except ValueError:
        return True
    return False
