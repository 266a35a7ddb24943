"""Which blocks to serve when the user named none, and when to move to others. Pure: no sockets, no clock.

A peer always takes as long a span as fits it (its memory is what the swarm is short of); only the place is chosen. What
a place is worth is counted in two measures, the first one outweighing the second:

1. *Replicas.* Every block should have as many peers as the memory of the whole swarm allows, up to
   `REPLICAS_WANTED`: one block without a peer outweighs any number of blocks with too few, and so on.
2. *Throughput.* A peer gives each block of its span `blocks_per_s / len(span)` tokens per second; the weaker a block,
   the more it gains. A steep power makes the weakest blocks outweigh all others.

Moves are a simulated best response of all peers (after Petals' rebalancing), made so that all who see the same records
come to the same moves: the best move of any peer is made first, then the best one after it, and so on. A peer moves if
its own move is among them and the swarm is clearly better after them.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dht.record import PeerRecord
from protocol.errors import ConfigError
from protocol.span import Span

REPLICAS_WANTED = 3
"""Beyond so many replicas of a block only throughput counts."""
LEAST_SHARE = 0.01
"""Added to a block's share of throughput, so that a block without any is infinitely poor only nearly."""
LEAST_WORTH = 0.0003
"""Moves that lessen the swarm's dearth by a smaller part of it are not worth simulating."""
LEVEL = 8192.0
"""Lacking the first replica weighs so many times more than lacking the second: more than any model has blocks."""
REBUILT_PEERS = 16
"""So few peers are also placed anew altogether when their moves are simulated."""
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
    """

    peer_id: str
    span: Span
    blocks_per_s: float
    serves: bool = True

    @property
    def tokens_per_s(self) -> float:
        """What it gives to each block of its span."""
        return max(self.blocks_per_s, MIN_BLOCKS_PER_S) / len(self.span)


@dataclass(frozen=True, slots=True)
class MovePolicy:
    """When a move pays. The defaults of placement live here.

    Attributes:
        gain: relative gain of the weakest block's throughput, after all simulated moves, from which they are made.
        gain_if_all_move: the same if these moves are of all peers, and less where they are of fewer: a peer that moves
            serves nobody for a minute or two.
        min_stay_s: so long a peer stays where it went, unless blocks lack a replica. The caller, who has the clock,
            asks `better_span` no sooner: see `may_move`.
        check_every_s: mean time between two checks.
        gap_check_every_s: the same while blocks lack a replica.
        jitter: checks come between (1 - jitter) and (1 + jitter) times these.
        load_cost: how many blocks to load weigh as much as one block that lacks its first replica; only breaks ties.
        stand_in: chance in one check, over all peers together, that one moves whose turn it is not: a peer whose turn
            it is may be pinned to its blocks, or dead.
        max_moves: so many moves are simulated.
    """

    gain: float = 0.05
    gain_if_all_move: float = 0.25
    min_stay_s: float = 900.0
    check_every_s: float = 600.0
    gap_check_every_s: float = 8.0
    jitter: float = 0.5
    stand_in: float = 0.1
    max_moves: int = 32


def placed(records: Iterable[PeerRecord], *, prior_blocks_per_s: float) -> tuple[Placed, ...]:
    """The peers that count for placement, where they will be: movers and joining ones at the span they claim.

    Draining peers that go nowhere, and those that left, do not count.

    Args:
        prior_blocks_per_s: for peers that have measured nothing yet.
    """
    found = []
    for record in records:
        if record.moving_to is None and record.state not in ("joining", "online"):
            continue
        if record.state == "offline":
            continue
        span = record.span if record.moving_to is None else record.moving_to
        serves = record.state == "online" and record.moving_to is None
        found.append(Placed(record.peer_id, span, _blocks_per_s(record, prior_blocks_per_s), serves))
    return tuple(found)


def _blocks_per_s(record: PeerRecord, prior: float) -> float:
    if record.tokens_per_s:
        return record.tokens_per_s * len(record.span)
    if record.step_ms:
        return 1000.0 / record.step_ms * len(record.span)
    return prior


def choose_span(
    n_blocks: int, legal_cuts: Sequence[int], others: Sequence[Placed], num_blocks: int, blocks_per_s: float
) -> Span:
    """The legal span of at most `num_blocks` blocks from which the swarm gains most. Among equals the earlier one.

    Args:
        legal_cuts: in order, 0 and `n_blocks` among them.
        blocks_per_s: of the newcomer.

    Raises:
        ConfigError: no two legal cuts are `num_blocks` or fewer blocks apart.
    """
    windows = _windows(tuple(legal_cuts), num_blocks)
    if not windows.count:
        smallest = min(b - a for a, b in pairwise(legal_cuts))
        raise ConfigError(
            f"this model cannot be cut into spans of {num_blocks} blocks; --num-blocks {smallest} at least"
        )
    board = _Board(n_blocks, others, newcomer_blocks=windows.lengths[-1])
    return board.best_place(windows, blocks_per_s)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a peer that looked whether to move found.

    Attributes:
        span: where it should move now; None: it stays.
        soon: blocks lack replicas that this peer could give: it should look again soon.
    """

    span: Span | None = None
    soon: bool = False


def lack(n_blocks: int, peers: Iterable[Placed]) -> float:
    """How much is lacking to the replicas that the memory of these peers allows: 0 if nothing.

    One block without a peer counts more than any number of blocks with too few.
    """
    return _Board(n_blocks, peers).lack


def lacking(n_blocks: int, peers: Iterable[Placed]) -> bool:
    """Has a block fewer replicas than the memory of these peers allows? Then a peer should look soon."""
    return lack(n_blocks, peers) > 0


def could_help(n_blocks: int, legal_cuts: Sequence[int], peers: Sequence[Placed]) -> frozenset[str]:
    """The ids of those who could give blocks replicas that they lack, by moving: who should look soon."""
    board = _Board(n_blocks, peers, legal_cuts)
    if not board.lack or not board.peer_ids:
        return frozenset()
    gains, _ = board.lack_gains(board.rows)
    return frozenset(board.peer_ids[row] for row in np.flatnonzero(board.serves & (gains > 0)))


def may_move(policy: MovePolicy, stayed_s: float, *, gap: bool) -> bool:
    """Has a peer that came `stayed_s` ago stayed long enough to be asked whether it moves?"""
    return gap or stayed_s >= policy.min_stay_s


def next_check_s(policy: MovePolicy, rng: random.Random, *, gap: bool) -> float:
    """Seconds until a peer should look again whether to move.

    Args:
        gap: blocks lack replicas (news that make `lacking` true, or `Outlook.soon`): look soon.
    """
    mean_s = policy.gap_check_every_s if gap else policy.check_every_s
    return mean_s * rng.uniform(1 - policy.jitter, 1 + policy.jitter)


def better_span(
    me: Placed,
    others: Sequence[Placed],
    n_blocks: int,
    legal_cuts: Sequence[int],
    num_blocks: int,
    policy: MovePolicy,
    *,
    rng: random.Random | None = None,
) -> Span | None:
    """Where `me` should move now; None: it stays. See `outlook`."""
    return outlook(me, others, n_blocks, legal_cuts, num_blocks, policy, rng=rng).span


def outlook(
    me: Placed,
    others: Sequence[Placed],
    n_blocks: int,
    legal_cuts: Sequence[int],
    num_blocks: int,
    policy: MovePolicy,
    *,
    rng: random.Random | None = None,
    settled: bool = True,
) -> Outlook:
    """Whether and where `me` should move now.

    It moves if, in the simulated best response of all peers, it is one of those that move, and if that gives blocks a
    replica they lack or raises the weakest block's throughput by `policy.gain`. All who see the same records come to
    the same simulated moves, so that of a thousand who see a gap one goes.

    Args:
        others: without `me`.
        legal_cuts: in order, 0 and `n_blocks` among them.
        num_blocks: the most that `me` can hold. Of others it is not known: they are taken to keep their length.
        rng: for standing in, rarely, for a peer whose turn it is and that does not go; None: never.
        settled: has it stayed where it is for `policy.min_stay_s`? If not, it moves only to give replicas.
    """
    board = _Board(n_blocks, (*others, me), legal_cuts)
    row = board.row(me.peer_id)
    board.num_blocks[row] = num_blocks
    if board.lack and board.lack_gains(np.array([row]))[0][0] > 0:
        return Outlook(_fill(row, board, policy, rng), soon=True)
    if not settled or board.weakest * (1 + policy.gain) >= board.ceiling or not board.spares[row]:
        return Outlook()
    if board.lack and (board.serves & (board.lack_gains(board.rows)[0] > 0)).any():
        return Outlook()
    return Outlook(_level(row, board, policy))


def _fill(me: int, board: _Board, policy: MovePolicy, rng: random.Random | None) -> Span | None:
    """Where the peer of row `me` goes to give blocks a replica they lack: if it is its turn, or in another's stead."""
    could = 0
    own: Span | None = None
    for _ in range(policy.max_moves):
        gain, meanwhile = board.lack_gains(board.rows)
        able = board.serves & (gain > 0)
        if not able.any():
            break
        if own is None:
            could, own = int(able.sum()), board.best_moves(np.array([me])).span(0)
        value = np.where(able, gain - meanwhile / 4, -np.inf)
        rows = np.flatnonzero(value == value.max())
        first, span = _first(rows, board.best_moves(rows), board)
        if first == me:
            return span
        board.move(first, span)
    stands_in = rng is not None and rng.random() * max(could, 1) < policy.stand_in
    return own if stands_in else None


def _first(rows: Ints, moves: _Moves, board: _Board) -> tuple[int, Span]:
    """Which of these, whose moves give equally many replicas, goes first: who has least to load, else by its id.

    Speeds do not count: nobody knows the others' exactly, and all have to come to the same answer.
    """
    least = np.flatnonzero(moves.blocks_to_load == moves.blocks_to_load.min())

    def chance(index: np.int64) -> bytes:
        return hashlib.sha256(f"{board.peer_ids[rows[index]]} {moves.span(int(index))}".encode()).digest()

    index = int(max(least, key=chance))
    return int(rows[index]), moves.span(index)


def _level(me: int, board: _Board, policy: MovePolicy) -> Span | None:
    """Where `me` goes if the best moves of all, its own among them, clearly raise the weakest block's throughput."""
    few = len(board.rows) <= REBUILT_PEERS
    if not few and not board.is_among_best(me, policy.max_moves):
        return None
    aims = [board.copy()]
    if few:
        # Single moves get stuck where two peers would have to move together, which matters where there are few.
        aims += [board.rebuilt(order) for order in board.orders()]
    for aim in aims:
        aim.settle(policy.max_moves)
    aim = max(aims, key=lambda aim: (-aim.lack, aim.weakest * (1 - TIE)))
    span = aim.span(me)
    moved = float(((aim.starts != board.starts) | (aim.stops != board.stops)).mean())
    gain = max(policy.gain, policy.gain_if_all_move * moved)
    if span == board.span(me) or aim.lack > board.lack or aim.weakest < board.weakest * (1 + gain):
        return None
    return span if board.leads_to(aim, me) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Windows:
    """The longest legal spans of at most so many blocks, without those inside another.

    Padded to one shape for all lengths, int64 [cuts]; padding is the empty window 0:0.
    """

    starts: Ints
    stops: Ints
    count: int
    lengths: tuple[int, ...]
    """The different lengths among them."""


@lru_cache(maxsize=4096)
def _windows(cuts: tuple[int, ...], num_blocks: int) -> _Windows:
    spans: list[tuple[int, int]] = []
    for start in cuts:
        stop = cuts[bisect_right(cuts, start + num_blocks) - 1]
        if stop > start and (not spans or stop > spans[-1][1]):
            spans.append((start, stop))
    padded = np.array(spans + [(0, 0)] * (len(cuts) - len(spans)), dtype=np.int64)
    lengths = tuple(sorted({stop - start for start, stop in spans}))
    return _Windows(padded[:, 0], padded[:, 1], len(spans), lengths)


@lru_cache(maxsize=256)
def _stacked(windows: tuple[_Windows, ...]) -> tuple[Ints, Ints, Ints]:
    """Starts and stops [kinds, cuts], and the different lengths [kinds, most], padded with their last one."""
    most = max(len(each.lengths) for each in windows)
    lengths = [(*each.lengths, *(each.lengths[-1:] or (1,)) * most)[: max(most, 1)] for each in windows]
    return (
        np.stack([each.starts for each in windows]),
        np.stack([each.stops for each in windows]),
        np.array(lengths, dtype=np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Moves:
    """What the best move of each of some peers brings: arrays [peers].

    Attributes:
        lack_gain: less lack of replicas afterwards (`_Board.lack`).
        worth: less dearth of throughput afterwards (`_Board.dearth`).
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


class _Board:
    """All peers at their places, and what each block has.

    `starts`, `stops`, `rates` (blocks per second) are arrays [peers], `replicas` and `tokens_per_s` [n_blocks].

    Args:
        cuts: the legal ones; none: it is only looked at, nobody moves.
        newcomer_blocks: what one who is not among the peers yet will add to the swarm's memory.
    """

    def __init__(
        self, n_blocks: int, peers: Iterable[Placed], cuts: Sequence[int] = (), newcomer_blocks: int = 0
    ) -> None:
        # In one order for all who look, so that sums of floats, and with them ties, come out the same.
        ordered = sorted(peers, key=_peer_id)
        self.n_blocks = n_blocks
        self.cuts = tuple(cuts)
        self.peer_ids = [peer.peer_id for peer in ordered]
        self.rows = np.arange(len(ordered))
        self.starts = np.array([peer.span.start for peer in ordered], dtype=np.int64)
        self.stops = np.array([peer.span.stop for peer in ordered], dtype=np.int64)
        self.rates = np.maximum([peer.blocks_per_s for peer in ordered], MIN_BLOCKS_PER_S)
        self.serves = np.array([peer.serves for peer in ordered], dtype=bool)
        self.num_blocks = self.stops - self.starts
        memory = int(self.num_blocks.sum()) + newcomer_blocks
        wanted = min(REPLICAS_WANTED, max(1, memory // n_blocks))
        self.lack_at = np.array([LEVEL ** (2 - k) if k < wanted else 0.0 for k in range(REPLICAS_WANTED + 1)])
        self.ceiling = float(self.rates.sum()) / n_blocks
        """No placement gives the weakest block more."""
        self.scale = self.ceiling or 1.0
        self._count()

    def _count(self) -> None:
        each = self.rates / (self.stops - self.starts)
        edges = np.bincount(self.starts, minlength=self.n_blocks + 1) - np.bincount(
            self.stops, minlength=self.n_blocks + 1
        )
        self.replicas = edges.cumsum()[:-1]
        flow = np.bincount(self.starts, each, self.n_blocks + 1) - np.bincount(self.stops, each, self.n_blocks + 1)
        self.tokens_per_s = np.where(self.replicas > 0, np.maximum(flow.cumsum()[:-1], 0.0), 0.0)

    @property
    def weakest(self) -> float:
        return float(self.tokens_per_s.min())

    @property
    def lack(self) -> float:
        """How much is lacking to the replicas that memory allows."""
        return float(self._lack(self.replicas).sum())

    @property
    def dearth(self) -> float:
        """How badly throughput is distributed: mostly, how weak the weakest blocks are."""
        return float(self._dearth(self.tokens_per_s).sum())

    def row(self, peer_id: str) -> int:
        return bisect_left(self.peer_ids, peer_id)

    def span(self, row: int) -> Span:
        return Span(int(self.starts[row]), int(self.stops[row]))

    @property
    def spares(self) -> NDArray[np.bool_]:
        """Has each block of a peer another one that serves it already? [peers]"""
        starts, stops = self.starts[self.serves], self.stops[self.serves]
        size = self.n_blocks + 1
        serving = (np.bincount(starts, minlength=size) - np.bincount(stops, minlength=size)).cumsum()[:-1]
        alone = np.concatenate(([0], (serving < 2).cumsum()))
        return np.asarray(alone[self.stops] == alone[self.starts])

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
        return int((every.improves & self.serves & self.spares & (every.worth > own.worth[0])).sum()) < moves

    def copy(self) -> _Board:
        """The same, to be moved about."""
        twin = copy(self)
        twin.starts, twin.stops = self.starts.copy(), self.stops.copy()
        return twin

    def orders(self) -> list[Ints]:
        """Some orders, of rows, in which peers could be placed anew; the same for all who look.

        Those that give each block most first; the longest first; and a few at random.
        """
        each = self.rates / self.num_blocks
        fixed = [np.lexsort((self.rows, -each)), np.lexsort((self.rows, -each, -self.num_blocks))]
        shuffled = np.random.default_rng(len(self.rows))
        return fixed + [shuffled.permutation(self.rows) for _ in range(RANDOM_ORDERS)]

    def rebuilt(self, order: Ints) -> _Board:
        """As if all came anew in this order."""
        twin = self.copy()
        twin.replicas, twin.tokens_per_s = np.zeros_like(self.replicas), np.zeros_like(self.tokens_per_s)
        for row in order:
            span = twin.best_place(_windows(self.cuts, int(self.num_blocks[row])), self.rates[row])
            twin.starts[row], twin.stops[row] = span.start, span.stop
            twin.replicas[span.start : span.stop] += 1
            twin.tokens_per_s[span.start : span.stop] += self.rates[row] / len(span)
        twin._count()
        return twin

    def settle(self, max_moves: int) -> None:
        """Make the best move of any peer, and then the best one after it, until none is worth much.

        Nobody leaves a block that has no other peer, not even to come back to it.
        """
        for _ in range(max_moves):
            moves = self.best_moves(self.rows)
            worth = np.where(moves.improves & self.serves & self.spares, moves.worth, -np.inf)
            best = int(worth.argmax())
            if worth[best] < LEAST_WORTH * self.dearth:
                return
            self.move(best, moves.span(best))

    def leads_to(self, aim: _Board, first: int) -> bool:
        """Can all go to where they are in `aim`, one after the other, `first` before them, and no block suffer?

        Meanwhile nobody may leave a block that has no other peer, and no block may come to lack replicas.
        """
        now, left = self, [int(row) for row in np.flatnonzero((aim.starts != self.starts) | (aim.stops != self.stops))]
        following = [first]
        while left:
            spares = now.spares
            for row in following:
                after = now.copy()
                after.move(row, aim.span(row))
                if spares[row] and after.lack <= self.lack:
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
        starts, stops, lengths = _stacked(tuple(_windows(self.cuts, int(n)) for n in different))
        return starts[which], stops[which], lengths[which]

    def _here(self, rows: Ints) -> NDArray[np.bool_]:
        """Where each of these peers is: [peers, n_blocks]."""
        blocks = np.arange(self.n_blocks)
        return (blocks >= self.starts[rows, None]) & (blocks < self.stops[rows, None])

    def best_place(self, windows: _Windows, blocks_per_s: float) -> Span:
        """Where one who is not among the peers brings most."""
        rates = np.array([max(blocks_per_s, MIN_BLOCKS_PER_S)])
        best, _, _ = self._best(self.replicas[None], self.tokens_per_s[None], rates, *_stacked((windows,)))
        return Span(int(windows.starts[best[0]]), int(windows.stops[best[0]]))

    def best_moves(self, rows: Ints) -> _Moves:
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
        return _Moves(to_starts, to_stops, to_stops - to_starts - kept, lack_gain, worth, improves)

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


def _peer_id(peer: Placed) -> str:
    return peer.peer_id


def _sums(values: Floats, starts: Ints, stops: Ints) -> Floats:
    """Sums over windows: [peers, windows] from [peers, n_blocks]."""
    upto = np.zeros((values.shape[0], values.shape[1] + 1))
    values.cumsum(axis=1, out=upto[:, 1:])
    rows = np.arange(values.shape[0])[:, None]
    return np.asarray(upto[rows, stops] - upto[rows, starts])
