"""How long a hop that says nothing is waited for, when a step is late."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import cast

import pytest

from client.hop import Hop
from client.inquest import Report
from client.inquiry import QUIET_S, reports_of
from protocol.errors import PeerLost
from protocol.messages import Progress

TIMEOUT_S = 1.5
SILENT = 60.0
HERE = Progress(0, 0, 0, 0, 0, 0.0)


class Told:
    """A hop that reports after `after_s`."""

    def __init__(self, name: str, after_s: float) -> None:
        self.link = SimpleNamespace(peer=SimpleNamespace(peer_id=name))
        self._after_s = after_s

    async def progress(self, timeout_s: float) -> Report:
        await asyncio.sleep(min(self._after_s, timeout_s))
        return HERE if self._after_s < timeout_s else self.silent()

    def silent(self) -> PeerLost:
        return PeerLost("silent")


async def asked(*after_s: float, slack_s: float = 0.0, **rtts_ms: float) -> tuple[list[bool], float]:
    """Which of the hops a, b, ... were heard, and after how many seconds that was known."""
    hops = [cast(Hop, Told("abc"[i], after)) for i, after in enumerate(after_s)]
    began_s = time.monotonic()
    reports = await reports_of(hops, rtts_ms, TIMEOUT_S, slack_s)
    return [isinstance(report, Progress) for report in reports], time.monotonic() - began_s


@pytest.mark.parametrize(
    ("after_s", "options", "heard", "least_s", "most_s"),
    [
        ((0.0, 0.0, 0.0), {}, [True, True, True], 0.0, 0.25),
        ((0.0, SILENT, 0.0), {}, [True, False, True], QUIET_S, 1.0),
        ((SILENT, SILENT, 0.0), {}, [False, False, True], QUIET_S, 1.0),
        ((SILENT, SILENT), {}, [False, False], TIMEOUT_S, 5.0),
        ((0.2, 0.6), {}, [True, True], 0.6, 1.2),  # all take their time here
        ((0.0, 0.6), {"b": 250.0}, [True, True], 0.6, 1.2),  # it is far away
        ((0.0, 0.6), {"slack_s": 1.0}, [True, True], 0.6, 1.2),  # its line is busy
    ],
)
async def test_a_silent_hop_is_given_a_few_times_as_long_as_the_others_took(
    after_s: tuple[float, ...], options: dict[str, float], heard: list[bool], least_s: float, most_s: float
) -> None:
    found, took_s = await asked(*after_s, **options)
    assert found == heard
    assert least_s * 0.95 <= took_s <= most_s
