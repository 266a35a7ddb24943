"""The gate: who may open a session here, and on whose account it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peer.accounts import Account, Accounts, home_of
from protocol.credentials import check_member, signer_of
from protocol.errors import ConfigError, NotAdmitted
from protocol.id_lists import read_ids
from protocol.join_token import JoinToken, read_join_token
from protocol.messages import Open

CLIENT = "12D3Koo"
PEER = "Qm"
LEAST_ID_CHARS = 46


@dataclass(frozen=True, slots=True)
class Lists:
    """Whole ids of clients (`12D3Koo...`) and peers (`Qm...`). Ends of ids would not do: keys can be made to end alike.

    Attributes:
        allow: if any clients are named, no others open sessions; if any peers are, nothing is pushed to others.
        deny: these clients open none, and nothing is pushed to these peers, whatever `allow` says.
    """

    allow: frozenset[str] = frozenset()
    deny: frozenset[str] = frozenset()

    @classmethod
    def of(cls, allow: Iterable[str], deny: Iterable[str]) -> Lists:
        """Raises:
        ConfigError: one of them is no id.
        """
        lists = cls(frozenset(allow), frozenset(deny))
        for flag, names in (("--allow", lists.allow), ("--deny", lists.deny)):
            for name in sorted(names):
                if not name.startswith((CLIENT, PEER)) or not name.isalnum() or len(name) < LEAST_ID_CHARS:
                    raise ConfigError(
                        f"{flag} takes whole ids, of clients ({CLIENT}..., see `python -m client id`) and of peers "
                        f"({PEER}...), or @FILE with one on each line; {name!r} is none"
                    )
        return lists

    def permit(self, some_id: str, kind: str) -> bool:
        """Is that client or peer (by `kind`, `CLIENT` or `PEER`) let in?"""
        named = [name for name in self.allow if name.startswith(kind)]
        return some_id not in self.deny and (not named or some_id in self.allow)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a peer asks of those who come.

    Attributes:
        token: of the private swarm that it serves; None: the swarm is open.
        lists: of clients and peers.
    """

    token: JoinToken | None = None
    lists: Lists = Lists()

    @classmethod
    def read(cls, join_token: str | None, allow: Iterable[str], deny: Iterable[str]) -> Entry:
        """As settings say it. Blocks on the disk.

        Raises:
            ConfigError: the token has a mistake, a file cannot be read, or one of the ids is none.
        """
        lists = Lists.of(read_ids(allow, "--allow"), read_ids(deny, "--deny"))
        return cls(read_join_token(join_token), lists)


class Gate:
    """Admits clients to one peer."""

    def __init__(self, peer_id: str, accounts: Accounts, entry: Entry) -> None:
        self.accounts = accounts
        self._peer_id = peer_id
        self._entry = entry

    def admit(self, request: Open, connection: str, now_s: float, wall_s: float) -> Account:
        """The account on which `request` is opened.

        Args:
            connection: what gRPC calls the other side.
            now_s: monotonic.
            wall_s: since 1970.

        Raises:
            NotAdmitted: not for this client; the message says what it can do.
            PeerFull: not so often.
        """
        if self._entry.token is not None:
            check_member(request, self._peer_id, self._entry.token)
        client_id = signer_of(request, self._peer_id, wall_s)
        if not self._entry.lists.permit(client_id, CLIENT):
            raise NotAdmitted(
                f"this peer takes sessions of certain clients only: ask its operator to allow {client_id}"
                if client_id
                else "this peer takes sessions of certain clients only, and this one signs nothing: use a newer release"
            )
        account = self.accounts.of(home_of(connection), client_id, now_s)
        account.note_open(now_s)
        return account
