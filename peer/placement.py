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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
LEAST_WORTH = 0.005
"""Moves that lessen the swarm's dearth by a smaller part of it are not worth simulating."""
LEVEL = 8192.0
"""Lacking the first replica weighs so many times more than lacking the second: more than any model has blocks."""
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
    """

    peer_id: str
    span: Span
    blocks_per_s: float

    @property
    def tokens_per_s(self) -> float:
        """What it gives to each block of its span."""
        return max(self.blocks_per_s, MIN_BLOCKS_PER_S) / len(self.span)


@dataclass(frozen=True, slots=True)
class MovePolicy:
    """When a move pays. The defaults of placement live here.

    Attributes:
        gain: relative gain of the weakest block's throughput, after all simulated moves, from which they are made.
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

    gain: float = 0.15
    min_stay_s: float = 900.0
    check_every_s: float = 300.0
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
        found.append(Placed(record.peer_id, span, _blocks_per_s(record, prior_blocks_per_s)))
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
    if not windows.starts.size:
        smallest = min(b - a for a, b in pairwise(legal_cuts))
        raise ConfigError(
            f"this model cannot be cut into spans of {num_blocks} blocks; --num-blocks {smallest} at least"
        )
    board = _Board(n_blocks, others, newcomer_blocks=windows.longest)
    return board.best_place(windows, blocks_per_s)


def lack(n_blocks: int, peers: Iterable[Placed]) -> float:
    """How much is lacking to the replicas that the memory of these peers allows: 0 if nothing.

    One block without a peer counts more than any number of blocks with too few.
    """
    return _Board(n_blocks, peers).lack


def lacking(n_blocks: int, peers: Iterable[Placed]) -> bool:
    """Has a block fewer replicas than the memory of these peers allows? Then `gap` of `next_check_s` is true."""
    return lack(n_blocks, peers) > 0


def may_move(policy: MovePolicy, stayed_s: float, *, gap: bool) -> bool:
    """Has a peer that came `stayed_s` ago stayed long enough to be asked whether it moves?"""
    return gap or stayed_s >= policy.min_stay_s


def next_check_s(policy: MovePolicy, rng: random.Random, *, gap: bool) -> float:
    """Seconds until a peer should look again whether to move.

    Args:
        gap: blocks lack a replica (`lacking`): look soon.
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
    """Where `me` should move now; None: it stays.

    It moves if, in the simulated best response of all peers, it is one of those that move, and if that gives blocks a
    replica they lack or raises the weakest block's throughput by `policy.gain`. All who see the same records come to
    the same simulated moves, so that of a thousand who see a gap one goes.

    Args:
        others: without `me`.
        legal_cuts: in order, 0 and `n_blocks` among them.
        num_blocks: the most that `me` can hold. Of others it is not known: they are taken to keep their length.
        rng: for standing in, rarely, for a peer whose turn it is and that does not go; None: never.
    """
    cuts = tuple(legal_cuts)
    mine = _windows(cuts, num_blocks)
    board = _Board(n_blocks, (*others, me))
    if not mine.starts.size or (not board.lack and board.weakest * (1 + policy.gain) >= board.ceiling):
        return None
    own = board.best_move(me, mine)
    if own is None:
        return None
    if own.lack_gain > 0:
        return _fill(own, board, cuts, mine, policy, rng)
    if board.lack or not board.spares(me.span):
        return None
    return _level(me, board, cuts, mine, policy)


def _fill(
    own: _Move, board: _Board, cuts: tuple[int, ...], mine: _Windows, policy: MovePolicy, rng: random.Random | None
) -> Span | None:
    """Where `own.peer` goes to give blocks a replica they lack: if it is its turn, or, rarely, in another's stead."""
    could = 0
    for _ in range(policy.max_moves):
        moves = [move for move in board.best_moves(cuts, own.peer.peer_id, mine) if move.lack_gain > 0]
        could = could or len(moves)
        if not moves:
            break
        first = max(moves, key=_turn)
        if first.peer.peer_id == own.peer.peer_id:
            return first.span
        board = board.after(first)
    if rng is not None and rng.random() * max(could, 1) < policy.stand_in:
        return own.span
    return None


def _level(me: Placed, board: _Board, cuts: tuple[int, ...], mine: _Windows, policy: MovePolicy) -> Span | None:
    """Where `me` goes if the best moves of all, `me` among them, clearly raise the weakest block's throughput."""
    before = board.weakest
    for _ in range(policy.max_moves):
        moves = [move for move in board.best_moves(cuts, me.peer_id, mine) if board.spares(move.peer.span)]
        best = max(moves, key=lambda move: move.worth, default=None)
        if best is None or best.worth < LEAST_WORTH * board.dearth:
            break
        board = board.after(best)
    target = board.peers[me.peer_id].span
    return target if target != me.span and board.weakest >= before * (1 + policy.gain) else None


def _turn(move: _Move) -> tuple[float, int, bytes]:
    """Who goes first to where replicas lack. Only whole numbers count, for speeds are known to nobody exactly."""
    chance = hashlib.sha256(f"{move.peer.peer_id} {move.span}".encode()).digest()
    return (move.lack_gain - move.lack_meanwhile / 4, -move.blocks_to_load, chance)


@dataclass(frozen=True, slots=True)
class _Windows:
    """The longest legal spans of at most so many blocks, without those inside another: int64 [windows] each."""

    starts: Ints
    stops: Ints

    @property
    def longest(self) -> int:
        return int((self.stops - self.starts).max())

    def by_length(self) -> Iterable[tuple[int, _Windows]]:
        lengths = self.stops - self.starts
        for length in sorted(set(lengths.tolist())):
            these = lengths == length
            yield length, _Windows(self.starts[these], self.stops[these])


@lru_cache(maxsize=1024)
def _windows(cuts: tuple[int, ...], num_blocks: int) -> _Windows:
    starts: list[int] = []
    stops: list[int] = []
    for start in cuts:
        stop = max(cut for cut in cuts if cut <= start + num_blocks)
        if stop > start and (not stops or stop > stops[-1]):
            starts.append(start)
            stops.append(stop)
    return _Windows(np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Move:
    """What one peer's best move brings.

    Attributes:
        lack_gain: less lack of replicas afterwards (`_Board.lack`).
        lack_meanwhile: more lack of replicas while it loads.
        worth: less dearth of throughput afterwards (`_Board.dearth`).
    """

    peer: Placed
    span: Span
    lack_gain: float
    lack_meanwhile: float
    worth: float

    @property
    def blocks_to_load(self) -> int:
        kept = self.peer.span.overlap(self.span)
        return len(self.span) - (len(kept) if kept else 0)


class _Board:
    """All peers at their places, and what each block has: replicas int64 [n_blocks], tokens_per_s float64 [n_blocks].

    Args:
        newcomer_blocks: what one who is not among the peers yet will add to the swarm's memory.
    """

    def __init__(self, n_blocks: int, peers: Iterable[Placed], newcomer_blocks: int = 0) -> None:
        self.n_blocks = n_blocks
        # In one order for all who look, so that sums of floats, and with them ties, come out the same.
        self.peers = {peer.peer_id: peer for peer in sorted(peers, key=lambda peer: peer.peer_id)}
        self.replicas = np.zeros(n_blocks, dtype=np.int64)
        self.tokens_per_s = np.zeros(n_blocks)
        for peer in self.peers.values():
            self.replicas[peer.span.start : peer.span.stop] += 1
            self.tokens_per_s[peer.span.start : peer.span.stop] += peer.tokens_per_s
        memory = sum(len(peer.span) for peer in self.peers.values()) + newcomer_blocks
        wanted = min(REPLICAS_WANTED, max(1, memory // n_blocks))
        self.lack_at = np.array([LEVEL ** (2 - k) if k < wanted else 0.0 for k in range(REPLICAS_WANTED + 1)])
        self.ceiling = sum(max(peer.blocks_per_s, MIN_BLOCKS_PER_S) for peer in self.peers.values()) / n_blocks
        """No placement gives the weakest block more."""
        self.scale = self.ceiling or 1.0

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

    def spares(self, span: Span) -> bool:
        """Has each of these blocks another peer?"""
        return bool((self.replicas[span.start : span.stop] > 1).all())

    def after(self, move: _Move) -> _Board:
        moved = replace(move.peer, span=move.span)
        return _Board(self.n_blocks, (self.peers | {moved.peer_id: moved}).values())

    def best_place(self, windows: _Windows, blocks_per_s: float) -> Span:
        """Where one who is not among the peers brings most."""
        newcomer = Placed("", Span(0, 1), blocks_per_s)
        (place,) = self._places([newcomer], self.replicas[None], self.tokens_per_s[None], windows)
        return place.span

    def best_move(self, peer: Placed, windows: _Windows) -> _Move | None:
        """The best place for one of the peers; None: where it is."""
        moves = self._moves([peer], windows)
        return moves[0] if moves else None

    def best_moves(self, cuts: tuple[int, ...], me: str, mine: _Windows) -> list[_Move]:
        """The best move of each peer that has one. Others than `me` keep their length."""
        groups: dict[int, list[Placed]] = {}
        for peer in self.peers.values():
            if peer.peer_id != me:
                groups.setdefault(len(peer.span), []).append(peer)
        moves = self._moves([self.peers[me]], mine)
        for length, group in groups.items():
            windows = _windows(cuts, length)
            if windows.starts.size:
                moves += self._moves(group, windows)
        return moves

    def _moves(self, group: list[Placed], windows: _Windows) -> list[_Move]:
        replicas = np.repeat(self.replicas[None], len(group), axis=0)
        tokens_per_s = np.repeat(self.tokens_per_s[None], len(group), axis=0)
        for row, peer in enumerate(group):
            replicas[row, peer.span.start : peer.span.stop] -= 1
            tokens_per_s[row, peer.span.start : peer.span.stop] -= peer.tokens_per_s
        np.maximum(tokens_per_s, 0.0, out=tokens_per_s)
        moves = []
        for row, (peer, place) in enumerate(
            zip(group, self._places(group, replicas, tokens_per_s, windows), strict=True)
        ):
            here = slice(peer.span.start, peer.span.stop)
            without, alone = replicas[row, here], tokens_per_s[row, here]
            staying = float((self._lack(without) - self._lack(without + 1)).sum())
            staying_worth = float((self._dearth(alone) - self._dearth(alone + peer.tokens_per_s)).sum())
            move = _Move(peer, place.span, place.lack_gain - staying, staying, place.worth - staying_worth)
            if place.span != peer.span and (move.lack_gain, move.worth) > (0.0, LEAST_WORTH * self.scale):
                moves.append(move)
        return moves

    def _places(self, group: list[Placed], replicas: Ints, tokens_per_s: Floats, windows: _Windows) -> list[_Move]:
        """Per peer of the group the best of the windows, given what the others give: [peers, n_blocks] both."""
        lack_gain = _sums(self._lack(replicas) - self._lack(replicas + 1), windows)
        worth = np.empty_like(lack_gain)
        rates = np.array([max(peer.blocks_per_s, MIN_BLOCKS_PER_S) for peer in group])[:, None]
        now = self._dearth(tokens_per_s)
        lengths = windows.stops - windows.starts
        for length, these in windows.by_length():
            worth[:, lengths == length] = _sums(now - self._dearth(tokens_per_s + rates / length), these)
        most = lack_gain.max(axis=1, keepdims=True)
        worth = np.where(lack_gain == most, worth, -np.inf)
        richest = worth.max(axis=1, keepdims=True)
        best = (worth >= richest - TIE * np.abs(richest)).argmax(axis=1)
        return [
            _Move(
                peer,
                Span(int(windows.starts[b]), int(windows.stops[b])),
                float(lack_gain[row, b]),
                0.0,
                float(worth[row, b]),
            )
            for row, (peer, b) in enumerate(zip(group, best.tolist(), strict=True))
        ]

    def _lack(self, replicas: Ints) -> Floats:
        return self.lack_at[np.minimum(replicas, REPLICAS_WANTED)]

    def _dearth(self, tokens_per_s: Floats) -> Floats:
        squared = (tokens_per_s / self.scale + LEAST_SHARE) ** 2
        return 1.0 / (squared * squared)


def _sums(values: Floats, windows: _Windows) -> Floats:
    """Sums over the windows: [peers, windows] from [peers, n_blocks]."""
    upto = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=upto[:, 1:])
    return upto[:, windows.stops] - upto[:, windows.starts]
