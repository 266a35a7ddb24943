"""What the device computes next: decode steps and pieces of prefills of many sessions, in one pass. Pure: no clock.

Two promises, kept by what a pass may cost:

- **Clients share alike.** With n clients at work, no pass takes more than n times what a decode step would alone; and
  whoever was served least is served first. That holds for passes without them, too, while they are in the middle of an
  answer: their next step may come at any moment, and would wait. Where it is due, the pass waits for it: else it would
  wait for two passes. A client with a hundred sessions slows another one down as if it had one.
- **Prefills never stall decoding.** While sessions decode, the pieces of prefills in a pass take `prefill_share` of its
  time at most: so a pass is 1 / (1 - share) times as long as without them, and a prefill keeps about that share of
  its speed. Where clients are few, their fair parts are less; where a client's part is too small for both, its prompts
  and its decode steps take turns.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from protocol.span import Span

LEAST_PIECE: Final = 8
"""Tokens of a piece of a prefill, where there is room for any: or else prefills would wait for ever."""

FEW_TOKENS: Final = 4  # a pass of no more tells what a pass costs
TOKENS_OF_A_PASS: Final = 16.0
"""A pass costs about as much as so many tokens more in one, until it is measured."""
MOST_TOKENS_OF_A_PASS: Final = 256.0
"""As many as that on the quickest devices."""
UNKNOWN_MS: Final = 10.0
LEAST_MS: Final = 0.01
REMEMBERED: Final = 16  # passes of each kind

SHARED: Final = 0.9
"""Of what a pass may cost that clients share: the rest is for what goes on around it."""

GATHERING: Final = 0.9
"""Of the time of a pass: so long it may wait for steps that are due. Without them there would be two passes: whoever
waits for less than the time of one, gains."""
LATE: Final = 0.3
"""Of the time of a pass: so much later than expected a step may come."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A step that could be computed now.

    Attributes:
        number: grows with each step that comes.
        client: whose it is.
        span: the blocks that it passes.
        tokens: rows x tokens that are not computed yet.
        packs: can it share a pass, and be computed in pieces?
        decodes: does it go on with an answer, so that somebody waits for each token?
    """

    number: int
    client: str
    span: Span
    tokens: int
    packs: bool
    decodes: bool


@dataclass(frozen=True, slots=True)
class Due:
    """The next step of an answer, which is not here yet.

    Attributes:
        client: whose it will be.
        in_ms: when it is likely to come, from now.
    """

    client: str
    in_ms: float


@dataclass(frozen=True, slots=True)
class Piece:
    """So many tokens of the step `number`, its next ones."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Costs:
    """What passes cost on this device. More tokens cost less than in proportion, and jump where a device takes to other
    kernels: so what was measured counts, and straight lines between.

    Attributes:
        pass_ms: of a pass, whatever is in it.
        token_ms: of each token beyond those that were measured.
        measured: tokens and milliseconds of passes, ascending in both.
    """

    pass_ms: float
    token_ms: float
    measured: tuple[tuple[float, float], ...] = ()

    def of(self, tokens: float) -> float:
        """Milliseconds of a pass of so many tokens."""
        before = (0.0, self.pass_ms)
        for point in self.measured:
            if tokens < point[0]:
                return before[1] + (tokens - before[0]) / (point[0] - before[0]) * (point[1] - before[1])
            before = point
        return before[1] + (tokens - before[0]) * self.token_ms

    def most(self, ms: float, bound: int) -> int:
        """The most tokens that a pass of so many milliseconds can have, up to `bound`."""
        return bisect_right(range(bound + 1), ms, key=self.of) - 1


class CostModel:
    """Learns from passes what the next ones cost. Of the last passes of few tokens the quickest one
    counts, since what delays a pass is not its own; of the others the median of those that had about as many.
    """

    def __init__(self) -> None:
        self._few_ms: deque[float] = deque(maxlen=REMEMBERED)
        self._like: dict[int, deque[tuple[int, float]]] = {}  # tokens and milliseconds, by the tokens' bits

    def note(self, tokens: int, took_ms: float) -> None:
        """A pass of so many tokens over the whole span took so long."""
        if tokens <= FEW_TOKENS:
            self._few_ms.append(took_ms)
        else:
            self._like.setdefault(tokens.bit_length(), deque(maxlen=REMEMBERED)).append((tokens, took_ms))

    def now(self, step_ms: float | None) -> Costs:
        """What passes cost. `step_ms`: of one token, by the peer's own measurement; a guess until there are passes."""
        pass_ms = max(min(self._few_ms, default=step_ms or UNKNOWN_MS), LEAST_MS)
        least_ms = pass_ms / MOST_TOKENS_OF_A_PASS
        measured: list[tuple[float, float]] = []
        latest = (0.0, pass_ms)
        for _, passes in sorted(self._like.items()):
            tokens, took_ms = (median(each) for each in zip(*passes, strict=True))
            latest = (tokens, max(took_ms, latest[1] + (tokens - latest[0]) * least_ms))
            measured.append(latest)
        token_ms = (latest[1] - pass_ms) / latest[0] if measured else pass_ms / TOKENS_OF_A_PASS
        return Costs(pass_ms, token_ms, tuple(measured))


def _limit_ms(clients: Collection[str], steps: Iterable[Waiting], costs: Costs) -> float:
    """What a pass may cost that several clients share, or would have to wait for. Who is alone shares with nobody."""
    least = min((step.tokens for step in steps if step.decodes), default=1)
    return SHARED * len(clients) * costs.of(least) if len(clients) > 1 else math.inf


class Scheduler:
    """Chooses passes. Remembers what each client was given, for as long as it has something to wait for.

    Args:
        max_batch: steps in one pass.
        max_tokens: of one pass.
        prefill_share: of the time of a pass, while sessions decode.
    """

    def __init__(self, max_batch: int, max_tokens: int, prefill_share: float) -> None:
        self._max_batch = max_batch
        self._max_tokens = max_tokens
        self._prefill_share = prefill_share
        self._served_ms: dict[str, float] = {}  # by client; only differences count
        self._prompted: set[str] = set()  # clients whose prompts went while all their decode steps waited

    def step(
        self, waiting: Sequence[Waiting], costs: Costs, decoding: int, clients: Collection[str] = ()
    ) -> tuple[Piece, ...]:
        """The next pass; empty if nothing waits. A step that cannot be packed has one of its own.

        Args:
            decoding: sessions that are in the middle of an answer, their steps here or elsewhere in their chains.
            clients: whose these sessions are.
        """
        self._admit({step.client for step in waiting})
        line = self._in_turn(waiting)
        if not line:
            return ()
        first = line[0]
        if not first.packs:
            pieces = [Piece(first.number, first.tokens)]
        else:
            line = [step for step in line if step.packs and step.span == first.span]
            decoders = {step.client for step in line if step.decodes}
            self._prompted &= decoders
            line = [step for step in line if step.decodes or step.client not in self._prompted]
            pieces = self._decodes(line, costs, clients)
            limit_ms = _limit_ms({*clients, *(step.client for step in waiting)}, line, costs) if decoding else math.inf
            prompts = self._prefills(line, costs, pieces, max(decoding, len(pieces)), limit_ms)
            served, prompted = (_clients_of(chosen, line) for chosen in (pieces, prompts))
            self._prompted = (self._prompted - served) | ((prompted & decoders) - served)
            pieces += prompts
        self._charge(pieces, waiting, costs)
        return tuple(pieces)

    def patience_ms(self, waiting: Sequence[Waiting], waited_ms: float, due: Iterable[Due], costs: Costs) -> float:
        """For how long the next pass may wait for more steps. Two kinds are worth it. The next one of a client that has
        none here, beside others who have: it would wait for a pass in which it has no part. And, where decode steps
        share a pass, one more of these, which else would need a pass of its own; but those who have few here do not
        wait for one who has more already, beyond what the pass may cost.

        Args:
            waited_ms: for how long the pass has waited by now.
            due: of each other session in the middle of an answer.
        """
        here = [step for step in waiting if step.decodes and step.packs]
        clients, due = {step.client for step in waiting}, list(due)
        taking_part = {step.client for step in waiting if step.decodes}
        late_ms, most_ms = LATE * costs.pass_ms, GATHERING * costs.pass_ms
        gathers = 0 < len(here) < self._max_batch
        steps = Counter(step.client for step in here)
        fewest = min(steps.values(), default=0)
        tokens = sum(step.tokens for step in here) + (LEAST_PIECE if len(here) < len(waiting) else 0)
        limit_ms = _limit_ms({*clients, *(step.client for step in due)}, here, costs)
        longest_ms = 0.0
        for step in due:
            is_absent = step.client not in taking_part and clients != {step.client}
            left_ms = most_ms if gathers or (is_absent and len(taking_part) < self._max_batch) else 0.0
            if steps[step.client] > fewest:
                left_ms = min(left_ms, limit_ms - costs.of(tokens + 1))
            left_ms -= waited_ms
            if -late_ms < step.in_ms <= left_ms:
                longest_ms = max(longest_ms, min(left_ms, step.in_ms + late_ms))
        return longest_ms

    def _decodes(self, line: Sequence[Waiting], costs: Costs, clients: Collection[str]) -> list[Piece]:
        steps = [step for step in line if step.decodes]
        if not steps:
            return []
        limit_ms = _limit_ms({*clients, *(step.client for step in steps)}, steps, costs)
        beside = LEAST_PIECE if any(not step.decodes for step in line) else 0  # which will be in the pass, too
        chosen: list[Piece] = []
        tokens = 0
        for step in steps:
            after = tokens + step.tokens
            if chosen and (after > self._max_tokens or costs.of(after + beside) > limit_ms):
                continue
            chosen.append(Piece(step.number, step.tokens))
            tokens = after
            if len(chosen) == self._max_batch:
                break
        return chosen

    def _prefills(
        self, line: Iterable[Waiting], costs: Costs, decodes: Sequence[Piece], decoding: int, limit_ms: float
    ) -> list[Piece]:
        decoded = sum(piece.tokens for piece in decodes)
        room = self._max_tokens - decoded
        if decoding:
            share = self._prefill_share
            most_ms = min(costs.of(decoded) + costs.of(decoding) * share / (1 - share), limit_ms)
            room = min(room, max(LEAST_PIECE, costs.most(most_ms, self._max_tokens) - decoded))
        chosen: list[Piece] = []
        for step in line:
            if step.decodes:
                continue
            tokens = min(step.tokens, room)
            if tokens < 1 or len(decodes) + len(chosen) >= self._max_batch:
                break
            chosen.append(Piece(step.number, tokens))
            room -= tokens
        return chosen

    # ------------------------------------------------------------------ whose turn it is

    def _admit(self, clients: Collection[str]) -> None:
        """Who comes, or comes back, has saved up nothing: it begins where the least served one is."""
        known = {client: ms for client, ms in self._served_ms.items() if client in clients}
        floor_ms = min(known.values(), default=0.0)
        self._served_ms = {client: known.get(client, floor_ms) for client in clients}

    def _in_turn(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Steps in the order in which they are due: each client's own as they came, clients by what they were served,
        and taking turns."""
        by_client: dict[str, list[Waiting]] = {}
        for step in sorted(waiting, key=lambda step: step.number):
            by_client.setdefault(step.client, []).append(step)
        ranked = [
            (turn, self._served_ms[client], steps[turn].number, steps[turn])
            for client, steps in by_client.items()
            for turn in range(len(steps))
        ]
        return [step for *_, step in sorted(ranked, key=lambda rank: rank[:3])]

    def _charge(self, pieces: Iterable[Piece], waiting: Sequence[Waiting], costs: Costs) -> None:
        clients = {step.number: step.client for step in waiting}
        chosen = list(pieces)
        tokens = sum(piece.tokens for piece in chosen)
        for piece in chosen:
            own_ms = (costs.of(tokens) - costs.pass_ms) * piece.tokens / tokens
            self._served_ms[clients[piece.number]] += costs.pass_ms / len(chosen) + own_ms


def _clients_of(pieces: Iterable[Piece], line: Iterable[Waiting]) -> set[str]:
    """Whose they are."""
    clients = {step.number: step.client for step in line}
    return {clients[piece.number] for piece in pieces}
