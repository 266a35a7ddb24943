"""An inquiry into a step that is late: all hops are asked where it is, as often as needed, until something is done.

`client.inquest` judges what they say. A hop that is at work, or a line on which bytes still arrive, is given time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence

from client import inquest
from client.config import ClientConfig
from client.hop import Hop
from client.inquest import Report
from client.loss import ChainBroken, Loss
from client.open_chain import OpenChain
from client.peers import Peers
from client.trial import Trial
from protocol.errors import PeerLost, PotluckError
from protocol.journal import Entry
from protocol.messages import Progress

ASK_AGAIN_S = 0.3  # after trouble in the same step or the one before it, once something was done about it
STUCK_S = 0.25  # between two looks at a step that has left one hop and not reached the next
BUSY_LOOK_S = (0.25, 2.0)  # between two looks at a hop that is at work, shortest and longest
SLOWEST_BYTES_PER_S = 128 << 10  # of a line that is slow, and not cut
BUSY_FACTOR = 4.0  # of `step_timeout_s`: for so long a step may move on and never come
QUIET_S = 0.3  # so long a hop may be silent, though others have answered; or longer, where round trips are
QUIET_FACTOR = 4.0  # times what the others took, or its own round trip


class Inquiry:
    """What is found out about one step. Begins when the client begins to wait for it."""

    def __init__(self, entry: Entry, trial: Trial, chain: OpenChain, peers: Peers, config: ClientConfig) -> None:
        self._entry = entry
        self._trial = trial
        self._chain = chain
        self._peers = peers
        self._config = config
        self._slack_s = entry.nbytes / SLOWEST_BYTES_PER_S  # what a line that is busy with the step may add
        self._seen: object = None
        self._began_s = self._since_s = time.monotonic()

    async def look(self) -> float:
        """Asks where the step is; finds another way for it, where an edge is cut. Returns after how many seconds to
        look again.

        Raises:
            ChainBroken: hops are silent, or have been at it for too long; or the client's own line to one is cut.
        """
        hops, rtts_ms = self._chain.hops, self._peers.times().rtts_ms
        reports = await reports_of(hops, rtts_ms, self._config.probe_timeout_s, self._slack_s)
        finding = inquest.judge(reports, self._entry.step_id)
        silent = [(hops[i], reports[i]) for i in finding.lost]
        if losses := [Loss(hop, error) for hop, error in silent if isinstance(error, PotluckError)]:
            raise ChainBroken(*losses)
        self._note(inquest.signs_of_life(reports, finding))
        for_ever_s = BUSY_FACTOR * self._config.step_timeout_s + self._slack_s
        if finding.busy is not None:
            hop = hops[finding.busy]
            if self._unchanged_s > self._config.step_timeout_s or self._total_s > for_ever_s:
                raise ChainBroken(Loss(hop, PeerLost(f"{hop.name} has been at one step for {self._total_s:.0f} s")))
            return _between(finding.expected_s, *BUSY_LOOK_S)
        assert finding.stuck is not None
        if self._unchanged_s < STUCK_S + self._slack_s and self._total_s < for_ever_s:
            return STUCK_S
        self._chain.unblock(finding.stuck, reports)
        self._trial.mended = True
        self._seen = None  # something was done about it
        return ASK_AGAIN_S

    def _note(self, signs: object) -> None:
        if signs != self._seen:
            self._seen, self._since_s = signs, time.monotonic()

    @property
    def _unchanged_s(self) -> float:
        """For how long nothing has changed."""
        return time.monotonic() - self._since_s

    @property
    def _total_s(self) -> float:
        return time.monotonic() - self._began_s


async def reports_of(
    hops: Sequence[Hop], rtts_ms: Mapping[str, float], timeout_s: float, slack_s: float = 0.0
) -> list[Report]:
    """How far each hop is, by its own word. All are asked at once: once others have answered, one that is silent is
    given no more than a few times as long.

    Args:
        rtts_ms: round trips to their peers, by peer id, as far as known.
        slack_s: what lines that are busy with a large step may add.
    """
    began_s, answered_s = time.monotonic(), math.inf
    asked = {asyncio.ensure_future(hop.progress(timeout_s + slack_s)): hop for hop in hops}
    silent = set(asked)
    try:
        while silent:
            slowest_s = max(rtts_ms.get(asked[each].link.peer.peer_id, 0.0) / 1e3 for each in silent)
            allowed_s = min(timeout_s, max(QUIET_S, QUIET_FACTOR * max(slowest_s, answered_s)))
            left_s = None if answered_s == math.inf else began_s + allowed_s + slack_s - time.monotonic()
            done, silent = await asyncio.wait(silent, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            if any(isinstance(each.result(), Progress) for each in done):
                answered_s = time.monotonic() - began_s
    finally:
        for each in silent:
            each.cancel()
    return [hop.silent() if each in silent else each.result() for each, hop in asked.items()]


def _between(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
