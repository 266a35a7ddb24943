"""Room: how much of a peer's cache its sessions will come to use, and which client has too much of it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from peer.accounts import Account
from peer.budget import RETRY_AFTER_S, KvBudget
from peer.session import Session
from protocol.errors import PeerFull

NEWEST_SHARE = 0.05  # of the newest session in what sessions use of what they announce
WATERMARK = 0.9
"""Of the budget: above it no session is opened beside others; what is left is for those that there are to grow."""


class Room:
    """Sessions announce how much they may come to use, and use less: how much less, those tell that end.

    Args:
        budget: of the cache.
        n_blocks: of the peer's span.

    Attributes:
        used_share: of what sessions announce, that they come to use.
    """

    def __init__(self, budget: KvBudget, n_blocks: int) -> None:
        self.used_share = 1.0
        self._budget = budget
        self._n_blocks = n_blocks

    @property
    def total(self) -> int:
        """Block-tokens of the whole cache."""
        return self._budget.tokens_total * self._n_blocks

    def tokens_left(self, sessions: Iterable[Session]) -> int:
        """Tokens per row over the whole span that a session beside these may hope for."""
        return max(0, self._budget.tokens_total - self.expected(sessions) // self._n_blocks)

    def expected(self, sessions: Iterable[Session]) -> int:
        """Block-tokens that these will come to use."""
        return sum(max(s.reserved, self.likely(s.announced)) for s in sessions)

    def likely(self, announced: int) -> int:
        """Block-tokens that a session will come to use which announces so many."""
        return int(self.used_share * announced)

    def is_there(self, wanted: int, sessions: Collection[Session]) -> bool:
        """Will so many block-tokens probably find room, beside what these sessions will grow to? Who is alone may fill
        the cache."""
        return not sessions or self.expected(sessions) + wanted <= WATERMARK * self.total

    def check_account(self, account: Account, wanted: int, sessions: Collection[Session]) -> None:
        """May a client, beside what it has among these, open a session of so many block-tokens?

        Raises:
            PeerFull: it would have too much of this peer.
        """
        mine, allowance = _of(account.name, sessions), account.allowance
        if len(mine) >= allowance.sessions:
            raise PeerFull(f"this client has {len(mine)} sessions here already", retry_after_s=RETRY_AFTER_S)
        if mine and has_others(account, sessions) and self.expected(mine) + wanted > allowance.share * self.total:
            raise PeerFull(
                f"this client would have more than {allowance.share:.0%} of this peer's cache while others have "
                "sessions",
                retry_after_s=RETRY_AFTER_S,
            )

    def beyond_share(self, account: Account, sessions: Collection[Session]) -> Session | None:
        """The newest session of a client other than `account` that has several, and more than its share."""
        share = account.allowance.share * self.total
        greedy = {
            name
            for name in {session.client for session in sessions} - {account.name}
            if len(mine := _of(name, sessions)) > 1 and self.expected(mine) > share
        }
        theirs = [session for session in sessions if session.client in greedy]
        return max(theirs, key=lambda session: session.number, default=None)

    def note_end(self, session: Session) -> None:
        """That session has come to use all that it will."""
        if session.announced:
            share = min(1.0, session.reserved / session.announced)
            self.used_share += NEWEST_SHARE * (share - self.used_share)


def has_others(account: Account, sessions: Iterable[Session]) -> bool:
    """Are there sessions of other clients?"""
    return any(session.client != account.name for session in sessions)


def _of(client: str, sessions: Iterable[Session]) -> list[Session]:
    return [session for session in sessions if session.client == client]
