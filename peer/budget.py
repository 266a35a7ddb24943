"""The declared budgets of a peer: KV cache, messages under way, journals. Held, never exceeded (law 5)."""

from __future__ import annotations

import asyncio
import threading

from protocol.errors import PeerFull
from protocol.journal import StepLog

RETRY_AFTER_S = 2.0


class MessageBudget:
    """Bytes of the steps that arrive, wait or run. Belongs to the event loop."""

    def __init__(self, total_bytes: int) -> None:
        self.bytes_total = total_bytes
        self.bytes_left = total_bytes
        self._freed = asyncio.Event()

    def reserve(self, nbytes: int) -> None:
        """Takes `nbytes` of the budget.

        Raises:
            PeerFull: they do not fit; nothing was taken.
        """
        if nbytes > self.bytes_left:
            raise PeerFull("this peer has as many steps waiting as its memory allows", retry_after_s=RETRY_AFTER_S)
        self.bytes_left -= nbytes

    def release(self, nbytes: int) -> None:
        """Gives `nbytes` back."""
        self.bytes_left += nbytes
        self._freed.set()
        assert self.bytes_left <= self.bytes_total, "released more than was reserved"

    async def freed(self) -> None:
        """Returns when bytes have been given back."""
        self._freed.clear()
        await self._freed.wait()


class MessageShare:
    """What one stream holds of the message budget, for a step that is not whole yet."""

    def __init__(self, budget: MessageBudget) -> None:
        self._budget = budget
        self._nbytes = 0

    def reserve(self, nbytes: int) -> None:
        """See `MessageBudget.reserve`."""
        self._budget.reserve(nbytes)
        self._nbytes += nbytes

    def hand_over(self) -> int:
        """The bytes that are held now belong to the caller."""
        nbytes, self._nbytes = self._nbytes, 0
        return nbytes

    def release(self) -> None:
        self._budget.release(self.hand_over())


class KvBudget:
    """Counts block-tokens: one token's keys and values (or state) in one block.

    Args:
        tokens: tokens that fit when each uses all of the peer's blocks.
        n_blocks: blocks of the peer's span.
    """

    def __init__(self, tokens: int, n_blocks: int) -> None:
        self.tokens_total = tokens
        self._n_blocks = n_blocks
        self._left = tokens * n_blocks

    @property
    def tokens_left(self) -> int:
        """Tokens that still fit over the whole span."""
        return self._left // self._n_blocks

    def reserve(self, block_tokens: int) -> None:
        """Takes `block_tokens` of the budget.

        Raises:
            PeerFull: they do not fit; nothing was taken.
        """
        if block_tokens > self._left:
            raise PeerFull(
                f"this peer's KV budget is used up: {self.tokens_left} of {self.tokens_total} tokens are left",
                retry_after_s=RETRY_AFTER_S,
            )
        self._left -= block_tokens

    def release(self, block_tokens: int) -> None:
        """Gives `block_tokens` back."""
        self._left += block_tokens
        assert self._left <= self.tokens_total * self._n_blocks, "released more than was reserved"


class JournalBudget:
    """Bytes of the journals that sessions keep for replacements of the peers after this one.

    Above the budget the largest journal is forgotten: that session's blocks would be computed again from further up.
    """

    def __init__(self, total_bytes: int) -> None:
        self.bytes_total = total_bytes
        self.evicted = 0  # journals that were forgotten so far
        self._logs: dict[int, StepLog] = {}
        self._lock = threading.Lock()  # steps are kept by the compute thread, sessions dropped by the event loop

    @property
    def bytes_used(self) -> int:
        """For any thread: of a copy, so that who asks holds up no step."""
        return sum(log.nbytes for log in list(self._logs.values()))

    def keep(self, log: StepLog) -> None:
        """Counts `log`, which has grown, and makes room."""
        with self._lock:
            self._logs[id(log)] = log
            while sum(log.nbytes for log in self._logs.values()) > self.bytes_total:
                largest = max(self._logs.values(), key=lambda log: log.evictable_bytes)
                if not largest.evictable_bytes:
                    return  # what is left are latest steps, which the next hops may not have yet
                largest.evict()
                self.evicted += 1

    def forget(self, log: StepLog) -> None:
        """The session of `log` ended."""
        with self._lock:
            self._logs.pop(id(log), None)
