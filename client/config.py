"""What a client can be told, and the defaults: flags, `POTLUCK_*` variables, the file's [client] table, or keywords."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from client.rules import MIN_END_CHARS, Rules
from protocol.errors import ConfigError
from protocol.id_lists import read_ids

SECTION = "client"

CodecName = Literal["int8", "blockwise8", "bf16", "fp16", "none"]
Speculate = Literal["auto", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How to find the swarm, and how patient to be with it.

    Raises:
        ConfigError: a time or a size is not positive, or a peer is named in a way that cannot mean one.
    """

    model: str | None = field(
        default=None, metadata={"help": "Hub id, local folder or potluck-demo; the swarm's only model if not given."}
    )
    join: tuple[str, ...] = field(
        default=(), metadata={"help": "Address of a peer or bootstrap node of the swarm; may be repeated."}
    )
    join_token: str | None = field(
        default=None,
        metadata={"help": "Join token of a private swarm, or a file that holds it (which `ps` does not show)."},
    )
    keep_key: bool = field(
        default=True,
        metadata={
            "help": "Sign with the key in Potluck's home folder, by which peers tell this client from others; off: with"
            " a new one each time, so that they do not know that it is the same one."
        },
    )
    route: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Use this peer wherever it serves, others only for what is left: its id, the end of it (6"
            " characters or more), or its public name; may be repeated."
        },
    )
    avoid: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Never use this peer: named as for --route, or @FILE with one on each line; may be repeated."
        },
    )
    trust: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "With --trusted-only, this peer may be used: its id or the end of it (anyone can take a public"
            " name), or @FILE with one on each line; may be repeated."
        },
    )
    trusted_only: bool = field(default=False, metadata={"help": "Use the peers of --trust alone."})
    direct: bool = field(
        default=True,
        metadata={
            "help": "Where a peer is reached through a relay, try to do without it: both dial at once, which most"
            " routers let through. The peer then sees this machine's address."
        },
    )
    codec: CodecName = field(default="int8", metadata={"help": "How activations are compressed on the wire."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32", metadata={"help": "Number format of the embeddings and the head."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the embeddings and the head, e.g. cuda:0."})
    wait_s: float = field(
        default=60.0, metadata={"help": "Seconds to wait for blocks that no peer serves, before giving up."}
    )
    open_timeout_s: float = field(
        default=2.0, metadata={"help": "Seconds that a peer which answers may take to open a session."}
    )
    probe_timeout_s: float = field(
        default=0.7, metadata={"help": "Seconds that a peer may take to say how far it is, when a step is late."}
    )
    step_timeout_s: float = field(
        default=30.0, metadata={"help": "Seconds that a peer which answers may take for one step."}
    )
    avoid_s: float = field(default=30.0, metadata={"help": "Seconds that a peer which failed is avoided."})
    refresh_s: float = field(default=15.0, metadata={"help": "Seconds between two looks at who serves what."})
    prefill_tokens: int = field(
        default=1024,
        metadata={"help": "A prompt travels in chunks of so many tokens (rows x tokens) at most, several at once."},
    )

    audit: float = field(
        default=0.01,
        metadata={
            "help": "Share of steps, at each peer of the chain, that another peer computes again, to find those that"
            " lie; 0: none."
        },
    )
    audit_blocks: str | None = field(
        default=None,
        metadata={
            "help": "Blocks of the model that this client loads itself, e.g. 0:4, or all: what peers compute with these"
            " it checks by itself, and believes nobody."
        },
    )
    audit_wait_s: float = field(
        default=5.0, metadata={"help": "Seconds that a finished answer waits for audits that are under way."}
    )
    speculate: Speculate = field(
        default="auto",
        metadata={
            "help": "auto: a step may carry guesses at the next tokens, where measured times say that this is faster;"
            " the answer stays the same. off: one token per step."
        },
    )
    draft: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub id of a small model with the same tokenizer, to guess the next tokens on this"
            " machine; without it they are looked up in the text so far."
        },
    )

    def __post_init__(self) -> None:
        for name in (
            "open_timeout_s",
            "probe_timeout_s",
            "step_timeout_s",
            "refresh_s",
            "prefill_tokens",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.audit <= 1:
            raise ConfigError(f"--audit is a share of steps, from 0 to 1, not {self.audit}")
        for name in ("wait_s", "avoid_s", "audit_wait_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("route", "avoid", "trust"):
            if isinstance(getattr(self, name), str) or not all(getattr(self, name)):
                raise ConfigError(f"{name} is a list of peers, not {getattr(self, name)!r}")
        if too_short := [name for name in self.trust if len(name) < MIN_END_CHARS and not name.startswith("@")]:
            raise ConfigError(f"--trust takes {MIN_END_CHARS} or more characters of a peer's id, not {too_short[0]!r}")
        if self.draft is not None and self.speculate == "off":
            raise ConfigError(
                "--draft names a model that guesses, and --speculate off allows no guesses: leave out one"
            )
        if self.trusted_only and not self.trust:
            raise ConfigError("--trusted-only leaves no peer: name those you trust with --trust PEER")

    def with_lists(self) -> ClientConfig:
        """The same, with the peers that are named in files instead of the files' names. Blocks on the disk.

        Raises:
            ConfigError: a file cannot be read, or a name in it cannot mean a peer.
        """
        return replace(
            self,
            route=read_ids(self.route, "--route"),
            avoid=read_ids(self.avoid, "--avoid"),
            trust=read_ids(self.trust, "--trust"),
        )

    @property
    def rules(self) -> Rules:
        """Which peers may be used, and which are preferred."""
        return Rules(self.route, self.avoid, self.trust, self.trusted_only)
