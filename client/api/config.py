"""What the HTTP gateway can be told, and the defaults: flags, `POTLUCK_*` variables, or the file's [api] table."""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol.errors import ConfigError

SECTION = "api"

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    """Where the gateway listens, to whom, and for how much at once.

    Raises:
        ConfigError: a number is out of range, or a key is empty.
    """

    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to listen at; 0.0.0.0: for other machines too, best with a key."},
    )
    port: int = field(default=8000, metadata={"help": "TCP port to listen at; 0: any that is free."})
    api_key: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Answer only to who sends this key (everything but /health); may be repeated. The variable keeps it"
            " out of the list of processes."
        },
    )
    parallel: int = field(default=16, metadata={"help": "Answers that are generated at the same time, at most."})
    queue: int = field(
        default=64, metadata={"help": "Answers that may wait for their turn; beyond that requests are refused (429)."}
    )
    answer_tokens: int = field(
        default=1024, metadata={"help": "Longest answer in tokens, where neither the request nor the model says."}
    )
    keep_alive_s: float = field(
        default=15.0,
        metadata={"help": "Seconds of silence after which a stream sends a comment, so that it stays open."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be from 0 to 65535, not {self.port}")
        for name in ("parallel", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.queue < 0:
            raise ConfigError(f"--queue must not be negative, but is {self.queue}")
        if not self.keep_alive_s > 0:
            raise ConfigError(f"--keep-alive-s must be positive, not {self.keep_alive_s}")
        if not all(self.api_key):
            raise ConfigError("--api-key is empty")
        if not all(key.isascii() and key.isprintable() for key in self.api_key):
            raise ConfigError("--api-key may have printable ASCII characters only: it travels in an HTTP header")
