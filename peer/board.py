"""The board of placement: all peers at their places, and what each place and each move is worth. Pure.

Two measures, the first one outweighing the second: what blocks *lack* of the replicas that memory allows, and the
*dearth* of throughput, which the weakest blocks make up nearly alone. As arrays, for thousands of peers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.span import Span

REPLICAS_WANTED = 3
"""Beyond so many replicas of a block only throughput counts."""
LEAST_SHARE = 0.01
"""Added to a block's share of throughput, so that a block without any is infinitely poor only nearly."""
LEAST_WORTH = 0.0003
"""Moves that lessen the swarm's dearth by a smaller part of it are not worth simulating."""
LEVEL = 8192.0
"""Lacking the first replica weighs so many times more than lacking the second: more than any model has blocks."""
RANDOM_ORDERS = 6
TIE = 1e-9
MIN_BLOCKS_PER_S = 1e-6
"""Slower is counted as this: a peer that says 0 still serves."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placed:
    """A peer as placement sees it: where it is (or has claimed to go), and what its device computes.

    Attributes:
        blocks_per_s: block-tokens per second: one token through one block counts one.
        serves: False while it loads: it has claimed its place, but nobody can leave the blocks to it yet.
        pinned: it never moves.
    """

    peer_id: str
    span: Span
    blocks_per_s: float
    serves: bool = True
    pinned: bool = False

    @property
    def tokens_per_s(self) -> float:
        """What it gives to each block of its span."""
        return max(self.blocks_per_s, MIN_BLOCKS_PER_S) / len(self.span)


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """The longest legal spans of at most so many blocks, without those inside another.

    Padded to one shape for all lengths, int64 [cuts]; padding is the empty window 0:0.
    """

    starts: Ints
    stops: Ints
    count: int
    lengths: tuple[int, ...]
    """The different lengths among them."""


@lru_cache(maxsize=4096)
def windows(cuts: tuple[int, ...], num_blocks: int) -> Windows:
    spans: list[tuple[int, int]] = []
    for start in cuts:
        stop = cuts[bisect_right(cuts, start + num_blocks) - 1]
        if stop > start and (not spans or stop > spans[-1][1]):
            spans.append((start, stop))
    padded = np.array(spans + [(0, 0)] * (len(cuts) - len(spans)), dtype=np.int64)
    lengths = tuple(sorted({stop - start for start, stop in spans}))
    return Windows(padded[:, 0], padded[:, 1], len(spans), lengths)


@lru_cache(maxsize=256)
def _stacked(windows: tuple[Windows, ...]) -> tuple[Ints, Ints, Ints]:
    """Starts and stops [kinds, cuts], and the different lengths [kinds, most], padded with their last one."""
    most = max(len(each.lengths) for each in windows)
    lengths = [(*each.lengths, *(each.lengths[-1:] or (1,)) * most)[: max(most, 1)] for each in windows]
    return (
        np.stack([each.starts for each in windows]),
        np.stack([each.stops for each in windows]),
        np.array(lengths, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class Moves:
    """What the best move of each of some peers brings: arrays [peers].

    Attributes:
        lack_gain: less lack of replicas afterwards (`Board.lack`).
        worth: less dearth of throughput afterwards (`Board.dearth`).
        improves: is it better than to stay?
    """

    starts: Ints
    stops: Ints
    blocks_to_load: Ints
    lack_gain: Floats
    worth: Floats
    improves: NDArray[np.bool_]

    def span(self, row: int) -> Span:
        return Span(int(self.starts[row]), int(self.stops[row]))


class Board:
    """All peers at their places, and what each block has.

    `starts`, `stops`, `rates` (blocks per second) are arrays [peers], `replicas` and `tokens_per_s` [n_blocks].

    Args:
        peers: of those outside the model nobody takes notice.
        cuts: the legal ones; none: it is only looked at, nobody moves.
        newcomer_blocks: what one who is not among the peers yet will add to the swarm's memory.
    """

    def __init__(
        self, n_blocks: int, peers: Iterable[Placed], cuts: Sequence[int] = (), newcomer_blocks: int = 0
    ) -> None:
        # In one order for all who look, so that sums of floats, and with them ties, come out the same.
        ordered = sorted((peer for peer in peers if peer.span.stop <= n_blocks), key=_peer_id)
        self.n_blocks = n_blocks
        self.cuts = tuple(cuts)
        self.peer_ids = [peer.peer_id for peer in ordered]
        self.rows = np.arange(len(ordered))
        self.starts = np.array([peer.span.start for peer in ordered], dtype=np.int64)
        self.stops = np.array([peer.span.stop for peer in ordered], dtype=np.int64)
        self.rates = np.maximum([peer.blocks_per_s for peer in ordered], MIN_BLOCKS_PER_S)
        self.serves = np.array([peer.serves for peer in ordered], dtype=bool)
        self.free = self.serves & ~np.array([peer.pinned for peer in ordered], dtype=bool)
        """Who can move."""
        self.num_blocks = self.stops - self.starts
        memory = int(self.num_blocks.sum()) + newcomer_blocks
        wanted = min(REPLICAS_WANTED, max(1, memory // n_blocks))
        self.lack_at = np.array([LEVEL ** (2 - k) if k < wanted else 0.0 for k in range(REPLICAS_WANTED + 1)])
        self.ceiling = float(self.rates.sum()) / n_blocks
        """No placement gives the weakest block more."""
        self.scale = self.ceiling or 1.0
        self._count()

    def _count(self, rows: Ints | None = None) -> None:
        """What each block has of these peers; None: of all."""
        starts, stops, rates = self.starts, self.stops, self.rates
        if rows is not None:
            starts, stops, rates = starts[rows], stops[rows], rates[rows]
        each, size = rates / (stops - starts), self.n_blocks + 1
        self.replicas = _depth(starts, stops, size)
        flow = (np.bincount(starts, each, size) - np.bincount(stops, each, size)).cumsum()[:-1]
        self.tokens_per_s = np.where(self.replicas > 0, np.maximum(flow, 0.0), 0.0)

    @property
    def weakest(self) -> float:
        return float(self.tokens_per_s.min())

    @property
    def lack(self) -> float:
        """How much is lacking to the replicas that memory allows."""
        return float(self._lack(self.replicas).sum())

    @property
    def poorest(self) -> int:
        """The first block of those that lack most."""
        return int(self._lack(self.replicas).argmax())

    @property
    def has_gap(self) -> bool:
        """Is there a block without any peer?"""
        return bool((self.replicas == 0).any())

    @property
    def dearth(self) -> float:
        """How badly throughput is distributed: mostly, how weak the weakest blocks are."""
        return float(self._dearth(self.tokens_per_s).sum())

    def row(self, peer_id: str) -> int:
        return bisect_left(self.peer_ids, peer_id)

    def span(self, row: int) -> Span:
        return Span(int(self.starts[row]), int(self.stops[row]))

    @property
    def serving(self) -> Ints:
        """How many peers serve each block already: int64 [n_blocks]."""
        return _depth(self.starts[self.serves], self.stops[self.serves], self.n_blocks + 1)

    @property
    def spares(self) -> NDArray[np.bool_]:
        """Has each block of a peer another one that serves it already? [peers]"""
        alone = np.concatenate(([0], (self.serving < 2).cumsum()))
        return np.asarray(alone[self.stops] == alone[self.starts])

    def can_leave(self, starts: Ints, stops: Ints) -> NDArray[np.bool_]:
        """May each peer go from where it is to these places, [peers], with nobody worse off?

        Each block that it gives up must have another peer that serves it already. So must those that it keeps, since it
        does not serve while it moves: unless no answer can be made anyway, because another block has no peer.
        """
        if not self.has_gap:
            return self.spares
        alone = np.concatenate(([0], (self.serving < 2).cumsum()))
        kept_starts = np.clip(starts, self.starts, self.stops)
        kept_stops = np.clip(stops, kept_starts, self.stops)
        left = alone[self.stops] - alone[kept_stops] + alone[kept_starts] - alone[self.starts]
        return np.asarray(left == 0)

    def can_go(self, rows: Sequence[int], spans: Sequence[Span]) -> NDArray[np.bool_]:
        """The same for some peers, each with its place: [rows]."""
        starts, stops = self.starts.copy(), self.stops.copy()
        starts[rows], stops[rows] = [span.start for span in spans], [span.stop for span in spans]
        return np.asarray(self.can_leave(starts, stops)[rows])

    def move(self, row: int, span: Span) -> None:
        self.starts[row], self.stops[row] = span.start, span.stop
        self._count()

    def is_among_best(self, row: int, moves: int) -> bool:
        """Is this peer's best move worth something, and so much that few others' are worth more?"""
        least = LEAST_WORTH * self.dearth
        own = self.best_moves(np.array([row]))
        if not own.improves[0] or own.worth[0] < least:
            return False
        every = self.best_moves(self.rows)
        return int((every.improves & self.free & self.spares & (every.worth > own.worth[0])).sum()) < moves

    def copy(self) -> Board:
        """The same, to be moved about."""
        twin = copy(self)
        twin.starts, twin.stops = self.starts.copy(), self.stops.copy()
        return twin

    def orders(self) -> list[Ints]:
        """Some orders, of rows, in which peers could be placed anew; the same for all who look.

        Those that give each block most first; the longest first; and a few at random.
        """
        each = self.rates / self.num_blocks
        orders = [np.lexsort((self.rows, -each)), np.lexsort((self.rows, -each, -self.num_blocks))]
        shuffled = np.random.default_rng(len(self.rows))
        orders += [shuffled.permutation(self.rows) for _ in range(RANDOM_ORDERS)]
        return [order[self.free[order]] for order in orders]

    def rebuilt(self, order: Ints) -> Board:
        """As if these came anew in this order, and all others were there before."""
        twin = self.copy()
        twin._count(np.setdiff1d(self.rows, order))
        for row in order:
            span = twin.best_place(windows(self.cuts, int(self.num_blocks[row])), self.rates[row])
            twin.starts[row], twin.stops[row] = span.start, span.stop
            twin.replicas[span.start : span.stop] += 1
            twin.tokens_per_s[span.start : span.stop] += self.rates[row] / len(span)
        twin._count()
        return twin

    def settle(self, max_moves: int) -> None:
        """Make the best move of any peer, and then the best one after it, until none is worth much.

        Only those move who can leave (`can_leave`).
        """
        for _ in range(max_moves):
            moves = self.best_moves(self.rows)
            able = moves.improves & self.free & self.can_leave(moves.starts, moves.stops)
            able &= (moves.lack_gain > 0) | (moves.worth >= LEAST_WORTH * self.dearth)
            if not able.any():
                return
            able &= moves.lack_gain == moves.lack_gain[able].max()
            best = int(np.where(able, moves.worth, -np.inf).argmax())
            self.move(best, moves.span(best))

    def leads_to(self, aim: Board, first: int, *, thin: bool) -> bool:
        """Can all go to where they are in `aim`, one after the other, `first` before them?

        Each of them must be able to leave (`can_leave`) when its turn comes.

        Args:
            thin: may blocks come to lack replicas, but the first one, meanwhile?
        """
        now, left = self, [int(row) for row in np.flatnonzero((aim.starts != self.starts) | (aim.stops != self.stops))]
        following = [first]
        while left:
            able = now.can_leave(aim.starts, aim.stops)
            for row in following:
                after = now.copy()
                after.move(row, aim.span(row))
                if able[row] and (thin or after.lack <= self.lack):
                    break
            else:
                return False
            left.remove(row)
            now, following = after, left
        return True

    def lack_gains(self, rows: Ints) -> tuple[Floats, Floats]:
        """How much less lack of replicas each of these peers could make, and how much more there is while it loads."""
        starts, stops = self.choices[0][rows], self.choices[1][rows]
        replicas = self.replicas - self._here(rows)
        gains = _sums(self._lack(replicas) - self._lack(replicas + 1), starts, stops).max(axis=1)
        staying = (self._lack(replicas) - self._lack(self.replicas)).sum(axis=1)
        return gains - staying, staying

    @cached_property
    def choices(self) -> tuple[Ints, Ints, Ints]:
        """The windows each peer can choose from: starts and stops [peers, cuts], different lengths [peers, kinds]."""
        different, which = np.unique(self.num_blocks, return_inverse=True)
        starts, stops, lengths = _stacked(tuple(windows(self.cuts, int(n)) for n in different))
        return starts[which], stops[which], lengths[which]

    def _here(self, rows: Ints) -> NDArray[np.bool_]:
        """Where each of these peers is: [peers, n_blocks]."""
        blocks = np.arange(self.n_blocks)
        return (blocks >= self.starts[rows, None]) & (blocks < self.stops[rows, None])

    def best_place(self, choice: Windows, blocks_per_s: float) -> Span:
        """Where one who is not among the peers brings most."""
        rates = np.array([max(blocks_per_s, MIN_BLOCKS_PER_S)])
        best, _, _ = self._best(self.replicas[None], self.tokens_per_s[None], rates, *_stacked((choice,)))
        return Span(int(choice.starts[best[0]]), int(choice.stops[best[0]]))

    def best_moves(self, rows: Ints) -> Moves:
        """The best place of each of these peers, the others staying where they are."""
        starts, stops, rates = self.starts[rows], self.stops[rows], self.rates[rows]
        here = self._here(rows)
        replicas = self.replicas - here
        own = here * (rates / (stops - starts))[:, None]
        tokens_per_s = np.maximum(self.tokens_per_s - own, 0.0) * (replicas > 0)
        staying_lack = (self._lack(replicas) - self._lack(self.replicas)).sum(axis=1)
        staying_worth = (self._dearth(tokens_per_s) - self._dearth(tokens_per_s + own)).sum(axis=1)
        to_starts, to_stops, lengths = (each[rows] for each in self.choices)
        best, lack_gain, worth = self._best(replicas, tokens_per_s, rates, to_starts, to_stops, lengths)
        each = np.arange(len(rows))
        to_starts, to_stops = to_starts[each, best], to_stops[each, best]
        kept = np.maximum(np.minimum(stops, to_stops) - np.maximum(starts, to_starts), 0)
        lack_gain, worth = lack_gain - staying_lack, worth - staying_worth
        moves = (to_stops > to_starts) & ((to_starts != starts) | (to_stops != stops))
        improves = moves & ((lack_gain > 0) | ((lack_gain == 0) & (worth > TIE * self.n_blocks)))
        return Moves(to_starts, to_stops, to_stops - to_starts - kept, lack_gain, worth, improves)

    def _best(
        self, replicas: Ints, tokens_per_s: Floats, rates: Floats, starts: Ints, stops: Ints, lengths: Ints
    ) -> tuple[Ints, Floats, Floats]:
        """Per peer the best of its windows where the others give this, and its gains in lack and worth.

        Args:
            replicas, tokens_per_s: [peers, n_blocks].
            rates: [peers].
            starts, stops, lengths: as in `choices`.
        """
        lack_gain = _sums(self._lack(replicas) - self._lack(replicas + 1), starts, stops)
        lack_gain[stops == starts] = -1.0
        now = self._dearth(tokens_per_s)
        worth = np.zeros_like(lack_gain)
        for length in lengths.T[:, :, None]:
            sums = _sums(now - self._dearth(tokens_per_s + rates[:, None] / length), starts, stops)
            worth = np.where(stops - starts == length, sums, worth)
        worth[lack_gain < lack_gain.max(axis=1, keepdims=True)] = -np.inf
        richest = worth.max(axis=1, keepdims=True)
        best = (worth >= richest - TIE * np.abs(richest)).argmax(axis=1)
        rows = np.arange(len(rates))
        return best, lack_gain[rows, best], worth[rows, best]

    def _lack(self, replicas: Ints) -> Floats:
        return self.lack_at[np.minimum(replicas, REPLICAS_WANTED)]

    def _dearth(self, tokens_per_s: Floats) -> Floats:
        squared = (tokens_per_s / self.scale + LEAST_SHARE) ** 2
        return 1.0 / (squared * squared)


def _depth(starts: Ints, stops: Ints, size: int) -> Ints:
    """How many of these spans each block lies in: int64 [size - 1]."""
    edges = np.bincount(starts, minlength=size) - np.bincount(stops, minlength=size)
    return np.asarray(edges.cumsum()[:-1])


def _peer_id(peer: Placed) -> str:
    return peer.peer_id


def _sums(values: Floats, starts: Ints, stops: Ints) -> Floats:
    """Sums over windows: [peers, windows] from [peers, n_blocks]."""
    upto = np.zeros((values.shape[0], values.shape[1] + 1))
    values.cumsum(axis=1, out=upto[:, 1:])
    rows = np.arange(values.shape[0])[:, None]
    return np.asarray(upto[rows, stops] - upto[rows, starts])
