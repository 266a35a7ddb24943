"""Every error that Potluck raises on purpose, as one tree.

    PotluckError
    ├── UserError                a person asked for something that cannot be: exit code 2, one sentence
    │   ├── ConfigError          a flag, variable or configuration file has a bad value
    │   ├── SwarmNotFound        no swarm was named and none was found
    │   │   └── ClockOff         this machine's clock and the swarm's disagree
    │   ├── BadRequest           a request over HTTP asks for what cannot be (client/api/errors.py)
    │   └── ModelError           the model cannot be used
    │       ├── UnknownModel     no folder, hub id, or embedded model of that name
    │       ├── NoBlockStack     the architecture has no stack of decoder blocks to slice
    │       ├── RemoteCodeRefused  the model needs trust_remote_code
    │       ├── BrokenCheckpoint   a shard is missing or truncated
    │       └── IllegalCut       a span the architecture cannot be cut into
    ├── WireError                bytes or messages that break the protocol
    │   ├── BadMessage           a field, size, shape or order is wrong
    │   ├── BadPayload           a tensor payload does not decode
    │   ├── Implausible          values that no model makes: NaN, Inf, absurdly large
    │   ├── VersionMismatch      the two sides speak different wire versions
    │   └── BadRecord            a swarm record that is forged, expired or malformed
    ├── PeerError                a peer did not do what was asked
    │   ├── PeerLost             it is gone, silent, or its stream broke (retryable: elsewhere)
    │   ├── PeerFull             its declared budget is used up (retryable: later or elsewhere)
    │   ├── PeerDraining         it is leaving and takes no new sessions (retryable: elsewhere)
    │   ├── SessionLost          it no longer knows the session (retryable: replay)
    │   ├── StaleEpoch           the session has moved on without the caller
    │   ├── NotAdmitted          it takes no sessions of this client: a token, a list or a signature says so
    │   ├── WrongModel           it serves another model, or other weights
    │   ├── Unseen               it does not see where the caller is (retryable: elsewhere)
    │   └── PeerFault            it failed internally (retryable: elsewhere)
    ├── Doubted                  what peers computed earlier in this session was wrong (retryable: begin it anew)
    ├── Busy                     as many requests over HTTP wait as may (retryable: later; client/api/errors.py)
    └── BlocksMissing            no chain covers the model: some blocks have no peer (retryable: later)

An error crosses the wire as its `code`, message, `retryable`, `retry_after_s` and the peer to blame; `from_wire` makes
the same class of it on the other side, so that `except PeerFull` means the same thing everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class PotluckError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: one sentence for a person; says what to do next where there is something to do.
        retryable: may the same request succeed later, or at another peer? Default: the class's `default_retryable`.
        retry_after_s: seconds after which a retry makes sense.
        peer_id: the peer to blame, where there is one.
    """

    code: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        peer_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = self.default_retryable if retryable is None else retryable
        self.retry_after_s = retry_after_s
        self.peer_id = peer_id


class UserError(PotluckError):
    """A person asked for something that cannot be."""

    code = "user-error"


class ConfigError(UserError):
    """A flag, an environment variable or the configuration file has a bad value."""

    code = "config"


class SwarmNotFound(UserError):
    """No swarm was named and none was found."""

    code = "swarm-not-found"


class ClockOff(SwarmNotFound):
    """This machine's clock and the swarm's disagree, so that each would take the other's records for expired."""

    code = "clock-off"


class ModelError(UserError):
    """The model cannot be used."""

    code = "model"


class UnknownModel(ModelError):
    """There is no folder, hub repository or embedded model of that name."""

    code = "unknown-model"


class NoBlockStack(ModelError):
    """The architecture has no stack of decoder blocks that could be sliced."""

    code = "no-block-stack"


class RemoteCodeRefused(ModelError):
    """The model needs `trust_remote_code`; Potluck never runs code that came with weights."""

    code = "remote-code"


class BrokenCheckpoint(ModelError):
    """A weight file is missing, truncated, or lacks a tensor."""

    code = "broken-checkpoint"


class IllegalCut(ModelError):
    """The architecture cannot be cut at the wanted places; `nearest` lists spans that it can be cut into."""

    code = "illegal-cut"

    def __init__(self, message: str, *, nearest: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.nearest = tuple(nearest)


class WireError(PotluckError):
    """Bytes or messages that break the protocol."""

    code = "wire"


class BadMessage(WireError):
    """A field, size, shape or the order of messages is wrong."""

    code = "bad-message"


class BadPayload(WireError):
    """A tensor payload does not decode."""

    code = "bad-payload"


class Implausible(WireError):
    """Activations that no model makes: not a number, infinite, or absurdly large."""

    code = "implausible"


class VersionMismatch(WireError):
    """The two sides speak different wire versions."""

    code = "version-mismatch"


class BadRecord(WireError):
    """A swarm record is forged, expired or malformed."""

    code = "bad-record"


class PeerError(PotluckError):
    """A peer did not do what was asked."""

    code = "peer"


class PeerLost(PeerError):
    """The peer is gone or silent, or its stream broke."""

    code = "peer-lost"
    default_retryable = True


class PeerFull(PeerError):
    """The peer's declared budget is used up."""

    code = "peer-full"
    default_retryable = True


class PeerDraining(PeerError):
    """The peer is leaving and takes no new sessions."""

    code = "peer-draining"
    default_retryable = True


class SessionLost(PeerError):
    """The peer no longer knows the session: it was idle too long, or the peer restarted."""

    code = "session-lost"
    default_retryable = True


class StaleEpoch(PeerError):
    """The session has moved on to a newer epoch; the caller belongs to an older one."""

    code = "stale-epoch"


class NotAdmitted(PeerError):
    """The peer takes no sessions of this client: its swarm is private, its lists say so, or a signature is wrong."""

    code = "not-admitted"


class WrongModel(PeerError):
    """The peer serves another model, other weights, or other blocks than asked for."""

    code = "wrong-model"


class Unseen(PeerError):
    """The peer does not see where the caller is, since the call came through a relay."""

    code = "unseen"
    default_retryable = True


class PeerFault(PeerError):
    """The peer failed internally."""

    code = "peer-fault"
    default_retryable = True


class BlocksMissing(PotluckError):
    """No chain covers the model; `missing` lists the spans that have no peer."""

    code = "blocks-missing"
    default_retryable = True

    def __init__(self, message: str, *, missing: Iterable[str] = (), retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.missing = tuple(missing)


class Doubted(PotluckError):
    """Something that peers computed earlier in this session was wrong: it has to begin anew.

    Args:
        position: the outputs of tokens from here on are not to be trusted.
    """

    code = "doubted"
    default_retryable = True

    def __init__(self, message: str, *, position: int = 0, peer_id: str | None = None) -> None:
        super().__init__(message, peer_id=peer_id)
        self.position = position


def _tree(root: type[PotluckError]) -> Iterable[type[PotluckError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def from_wire(
    code: str, message: str, *, retryable: bool, retry_after_s: float | None = None, peer_id: str | None = None
) -> PotluckError:
    """The error of class `code`; an unknown code (a newer peer's) becomes a `PeerError` with the given retryability."""
    cls = {c.code: c for c in _tree(PotluckError)}.get(code, PeerError)
    error = PotluckError.__new__(cls)
    PotluckError.__init__(error, message, retryable=retryable, retry_after_s=retry_after_s, peer_id=peer_id)
    if isinstance(error, IllegalCut):
        error.nearest = ()
    if isinstance(error, BlocksMissing):
        error.missing = ()
    if isinstance(error, Doubted):
        error.position = 0
    return error
