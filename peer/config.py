"""What a peer can be told, and the defaults: flags, `POTLUCK_*` variables, the file's [peer] table.

Fields without help are internal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peer.accounts import Allowance
from protocol.errors import ConfigError
from protocol.span import Span

SECTION = "peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """How a machine is shared.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder or potluck-demo. Not given: the swarm's only model; alone: potluck-demo."
        },
    )
    blocks: str | None = field(default=None, metadata={"help": "The blocks to serve, FIRST:END, e.g. 10:20."})
    num_blocks: int | None = field(
        default=None,
        metadata={"help": "How many blocks to serve, where the swarm is weakest. Not given: all that fit."},
    )
    join: tuple[str, ...] = field(
        default=(), metadata={"help": "Address of a peer or bootstrap node of the swarm to join; may be repeated."}
    )
    join_token: str | None = field(
        default=None,
        metadata={"help": "Join token of a private swarm, or a file that holds it (which `ps` does not show)."},
    )
    new_swarm: bool = field(default=False, metadata={"help": "Start a swarm of one's own, whatever could be found."})
    host: str = field(default="0.0.0.0", metadata={"help": "Address to listen on; 127.0.0.1 for this machine only."})  # noqa: S104
    port: int = field(default=0, metadata={"help": "Port for clients (gRPC); 0 picks a free one."})
    dht_port: int = field(default=0, metadata={"help": "Port for the swarm (libp2p); 0 picks a free one."})
    announce_host: str | None = field(
        default=None, metadata={"help": "Host that others reach this peer at, if it is not the one it listens on."}
    )
    announce_port: int | None = field(
        default=None, metadata={"help": "Port that others reach --port at, if a router forwards another one to it."}
    )
    relay: bool = field(
        default=True,
        metadata={
            "help": "Be there, too, for peers that nobody can dial: what they send and receive goes through here."
        },
    )
    relay_port: int = field(default=0, metadata={"help": "Port at which this peer relays; 0 picks a free one."})
    relay_announce_port: int | None = field(
        default=None,
        metadata={"help": "Port that others reach --relay-port at, if a router forwards another one to it."},
    )
    relay_mbps: float = field(
        default=50.0, metadata={"help": "How fast it relays at most, all together, in megabits per second."}
    )
    direct: bool = field(
        default=True,
        metadata={
            "help": "Where a relay is between this peer and another, try to do without it: both dial at once, which"
            " most routers let through."
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps. Not given: cuda if there is one."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Number format to compute in; auto: the checkpoint's; on a CPU float32, unless the checkpoint is "
            "in bfloat16 and the CPU multiplies that itself (AVX512-BF16, AMX)."
        },
    )
    quantization: Literal["none", "int8", "nf4"] = field(
        default="none",
        metadata={"help": "Keep the weights of linear layers in 8 or 4 bits: more blocks fit, and cost less to read."},
    )
    kv_tokens: int | None = field(
        default=None, metadata={"help": "Tokens kept for all sessions together. Not given: from free memory."}
    )
    max_sessions: int = field(default=256, metadata={"help": "Sessions at once."})
    client_sessions: int = field(default=64, metadata={"help": "Sessions at once of one client."})
    client_opens_per_s: float = field(
        default=20.0, metadata={"help": "Sessions that one client may open per second; a hundred at once."}
    )
    client_share: float = field(
        default=0.5,
        metadata={
            "help": "How much of the cache, and of the memory for steps, one client may have while others have"
            " sessions: with more it opens no further ones, and gives up its newest if others need room."
        },
    )
    client_mib_s: float = field(
        default=64.0, metadata={"help": "MiB per second of one client's steps; who sends more is read more slowly."}
    )
    clients_mib_s: float | None = field(
        default=None, metadata={"help": "MiB per second of all clients' steps together. Not given: no limit."}
    )
    address_keys: int = field(
        default=8, metadata={"help": "Clients that are told apart at one address; more of them count as one."}
    )
    address_streams: int = field(default=256, metadata={"help": "Streams that may be open from one address."})
    allow: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Only this client may open sessions: its id (`python -m client id`), or @FILE with one on each"
            " line; may be repeated. With the id of a peer: results are pushed to that one only."
        },
    )
    deny: tuple[str, ...] = field(
        default=(),
        metadata={"help": "This client may open no sessions, or nothing is pushed to this peer; given as for --allow."},
    )
    max_step_tokens: int = field(default=8192, metadata={"help": "Rows x tokens of one step."})
    max_batch: int = field(
        default=64, metadata={"help": "Sessions whose steps share one pass; 1: each has a pass of its own."}
    )
    prefill_share: float = field(
        default=0.7,
        metadata={
            "help": "How much of a pass's time prompts may take while other sessions decode: more, and prompts are read"
            " sooner; less, and tokens come more evenly."
        },
    )
    message_mib: int = field(default=512, metadata={"help": "Memory for steps that arrive, wait or run, in MiB."})
    journal_mib: int = field(
        default=256,
        metadata={"help": "Memory for what replacements of the peers after this one are told, all sessions, in MiB."},
    )
    session_idle_s: float = field(default=600.0, metadata={"help": "A session without a step for so long is dropped."})
    resume_s: float = field(
        default=60.0, metadata={"help": "So long a session waits for a client whose connection broke."}
    )
    drain_s: float = field(
        default=20.0,
        metadata={"help": "So long a peer that leaves or moves waits for its sessions to go on elsewhere."},
    )
    balance_every_s: float | None = field(
        default=None,
        metadata={
            "help": "Mean time between two looks whether other blocks need this peer more (not with --blocks). "
            "Not given: minutes, and seconds while blocks lack peers."
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads to compute with; torch's choice if not given."}
    )
    public_name: str | None = field(default=None, metadata={"help": "A name to be shown on health pages."})
    contact: str | None = field(
        default=None, metadata={"help": "How you can be reached, to be shown on health pages; everybody can read it."}
    )
    metrics_port: int | None = field(
        default=None, metadata={"help": "Port for Prometheus (HTTP, /metrics); 0 picks a free one. Not given: none."}
    )
    metrics_host: str = field(default="127.0.0.1", metadata={"help": "Address on which metrics are served."})
    lan: bool = field(default=True, metadata={"help": "Announce and look for swarms in the local network (mDNS)."})

    client_opens_at_once: int = 100
    """Sessions that one client opens without a pause."""
    stop_grace_s: float = 1.0
    """For steps under way when the port closes; streams that only rest are held open for so long, too."""

    def __post_init__(self) -> None:
        if self.blocks is not None:
            Span.parse(self.blocks)
            if self.num_blocks is not None:
                raise ConfigError("--blocks says which blocks to serve, --num-blocks how many: give one of them")
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"--num-blocks must be at least 1, not {self.num_blocks}")
        if self.new_swarm and self.join:
            raise ConfigError("--new-swarm and --join exclude each other")
        for name in ("port", "dht_port", "relay_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} must be between 0 and 65535, not {getattr(self, name)}")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigError(f"--metrics-port must be between 0 and 65535, not {self.metrics_port}")
        if self.announce_port is not None and not 1 <= self.announce_port <= 65535:
            raise ConfigError(f"--announce-port must be between 1 and 65535, not {self.announce_port}")
        if self.relay_announce_port is not None and not 1 <= self.relay_announce_port <= 65535:
            raise ConfigError(f"--relay-announce-port must be between 1 and 65535, not {self.relay_announce_port}")
        for name in (
            "relay_mbps",
            "drain_s",
            "balance_every_s",
            "kv_tokens",
            "max_sessions",
            "client_sessions",
            "client_opens_per_s",
            "client_mib_s",
            "clients_mib_s",
            "address_keys",
            "address_streams",
            "max_step_tokens",
            "max_batch",
            "message_mib",
            "journal_mib",
            "session_idle_s",
            "resume_s",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        if not 0 < self.prefill_share < 1:
            raise ConfigError(f"--prefill-share must be between 0 and 1, not {self.prefill_share}")
        if not 0 < self.client_share <= 1:
            raise ConfigError(f"--client-share must be above 0 and at most 1, not {self.client_share}")
        if self.public_name is not None and not 1 <= len(self.public_name) <= 64:
            raise ConfigError("--public-name has 1 to 64 characters")
        if self.contact is not None and not 1 <= len(self.contact) <= 100:
            raise ConfigError("--contact has 1 to 100 characters")
        for flag, value in (("--public-name", self.public_name), ("--contact", self.contact)):
            if value is not None and not value.isprintable():
                raise ConfigError(f"{flag} has characters that cannot be shown: {value!a}")

    @property
    def allowance(self) -> Allowance:
        """What one client may have."""
        return Allowance(
            sessions=self.client_sessions,
            opens_per_s=self.client_opens_per_s,
            opens_at_once=self.client_opens_at_once,
            tokens=self.client_sessions * self.max_step_tokens,
            bytes_per_s=self.client_mib_s * (1 << 20),
            share=self.client_share,
            keys=self.address_keys,
            streams=self.address_streams,
        )

    @property
    def span(self) -> Span | None:
        return None if self.blocks is None else Span.parse(self.blocks)
