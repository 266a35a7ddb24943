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
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dht.record import PeerRecord
from peer.board import TIE, Board, Placed, windows
from protocol.errors import ConfigError
from protocol.span import Span

__all__ = [
    "MovePolicy",
    "Outlook",
    "Placed",
    "better_span",
    "choose_span",
    "could_help",
    "lack",
    "lacking",
    "may_move",
    "next_check_s",
    "outlook",
    "placed",
]

CANDIDATES = 16
"""Of so many who could go equally well, the one who has least to load goes."""
FEW_PEERS = 16
"""So few peers are also placed anew altogether when their moves are simulated."""


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
        stand_in: chance in one check, over all peers together, that one moves whose turn it is not: a peer whose turn
            it is may be dead, or unable to load.
        max_moves: so many moves are simulated.
    """

    gain: float = 0.05
    gain_if_all_move: float = 0.1
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
        rate = _blocks_per_s(record, prior_blocks_per_s)
        found.append(Placed(record.peer_id, span, rate, serves, record.pinned))
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
    choice = windows(tuple(legal_cuts), num_blocks)
    if not choice.count:
        smallest = min(b - a for a, b in pairwise(legal_cuts))
        raise ConfigError(
            f"this model cannot be cut into spans of {num_blocks} blocks; --num-blocks {smallest} at least"
        )
    board = Board(n_blocks, others, newcomer_blocks=choice.lengths[-1])
    return board.best_place(choice, blocks_per_s)


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
    return Board(n_blocks, peers).lack


def lacking(n_blocks: int, peers: Iterable[Placed]) -> bool:
    """Has a block fewer replicas than the memory of these peers allows? Then a peer should look soon."""
    return lack(n_blocks, peers) > 0


def could_help(n_blocks: int, legal_cuts: Sequence[int], peers: Sequence[Placed]) -> frozenset[str]:
    """The ids of those who could give blocks replicas that they lack, by moving: who should look soon."""
    board = Board(n_blocks, peers, legal_cuts)
    if not board.lack or not board.peer_ids:
        return frozenset()
    gains, _ = board.lack_gains(board.rows)
    return frozenset(board.peer_ids[row] for row in np.flatnonzero(board.free & (gains > 0)))


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
    """Where `me` should move now; None: it stays. See `outlook`, which asks how long it has stayed.

    Here that is not known: while blocks lack replicas, it is taken to have come just now.
    """
    settled = not lacking(n_blocks, (*others, me))
    return outlook(me, others, n_blocks, legal_cuts, num_blocks, policy, rng=rng, settled=settled).span


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
    board = Board(n_blocks, (*others, me), legal_cuts)
    row = board.row(me.peer_id)
    board.num_blocks[row] = num_blocks
    few = len(board.rows) <= FEW_PEERS
    if board.lack:
        helpers = board.free & (board.lack_gains(board.rows)[0] > 0)
        helps = bool(helpers[row])
        if board.has_gap or not few:
            if helps:
                return Outlook(_fill(row, board, policy, rng), soon=True)
            if helpers.any():
                return Outlook()
        if few:
            span = _join_in(row, board, policy, settled)
            if span is None and helps:
                span = _stand_in(row, board, policy, rng)
            return Outlook(span, soon=helps or span is not None)
    if not settled or board.weakest * (1 + policy.gain) >= board.ceiling or not board.spares[row]:
        return Outlook()
    return Outlook(_join_in(row, board, policy, settled))


def _fill(me: int, board: Board, policy: MovePolicy, rng: random.Random | None) -> Span | None:
    """Where the peer of row `me` goes to give blocks a replica they lack: if it is its turn, or in another's stead."""
    then = board.copy()
    for _ in range(policy.max_moves):
        turn = _turn(then)
        if turn is None:
            break
        first, span = turn
        if first == me:
            # If it can go only after those before it have arrived, it waits for them.
            return span if board.can_go([me], [span])[0] else None
        then.move(first, span)
    return _stand_in(me, board, policy, rng)


def _turn(board: Board) -> tuple[int, Span] | None:
    """Who goes first to give blocks replicas that they lack, and where to; None: there is nobody who can leave.

    Of those who can give equally many, it is the one of a few who has least to load. Which few, is drawn by their ids
    and by the first block that lacks most. Speeds do not count: nobody knows the others' exactly, and all have to come
    to the same answer.
    """
    gain, meanwhile = board.lack_gains(board.rows)
    value = np.where(board.free & (gain > 0), gain - meanwhile / 4, -np.inf)
    while np.isfinite(value).any():
        best = np.flatnonzero(value == value.max()).tolist()
        drawn = sorted(best, key=lambda row: _lot(board.peer_ids[row], board.poorest))[:CANDIDATES]
        moves = board.best_moves(np.array(drawn))
        able = board.can_go(drawn, [moves.span(index) for index in range(len(drawn))])
        if able.any():
            index = int(np.where(able, moves.blocks_to_load, board.n_blocks + 1).argmin())
            return drawn[index], moves.span(index)
        value[drawn] = -np.inf
    return None


def _stand_in(me: int, board: Board, policy: MovePolicy, rng: random.Random | None) -> Span | None:
    """Where `me`, which could give replicas, goes though it is another's turn: rarely, the more of them there are."""
    gain, _ = board.lack_gains(board.rows)
    could = int((board.free & (gain > 0)).sum())
    if rng is None or rng.random() * max(could, 1) >= policy.stand_in:
        return None
    return board.best_moves(np.array([me])).span(0)


def _lot(peer_id: str, block: int) -> bytes:
    return hashlib.sha256(f"{peer_id} {block}".encode()).digest()


def _join_in(me: int, board: Board, policy: MovePolicy, settled: bool) -> Span | None:
    """Where `me` goes in moves of several, if these clearly raise the weakest block's throughput.

    Or, in a small swarm, if they give blocks replicas they lack.
    """
    few = len(board.rows) <= FEW_PEERS
    if not few and not board.is_among_best(me, policy.max_moves):
        return None
    aims = [board.copy()]
    if few:
        # Single moves get stuck where two peers would have to move together, which matters where there are few.
        aims += [board.rebuilt(order) for order in board.orders()]
    for aim in aims:
        aim.settle(policy.max_moves)
    aim = max(aims, key=lambda aim: (-aim.lack, aim.weakest * (1 - TIE)))
    moved = float(((aim.starts != board.starts) | (aim.stops != board.stops)).mean())
    gain = max(policy.gain, policy.gain_if_all_move * moved)
    pays = settled and aim.lack == board.lack and aim.weakest >= board.weakest * (1 + gain)
    span = aim.span(me)
    if span == board.span(me) or not (aim.lack < board.lack or pays):
        return None
    return span if board.leads_to(aim, me, thin=few) else None
