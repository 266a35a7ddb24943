"""Answers that are corrected: what stands between a streamer and an answer that begins anew, and the seeds of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

MOST_TRIES = 3  # of one answer; each time, peers that were found to lie are avoided


class Tracked(BaseStreamer):
    """Counts what a streamer was given.

    Where the answer begins anew before it has ended, tokens that were given already and are not in doubt are not given
    again; those that are come corrected, after the wrong ones. A streamer with a method `on_doubt(first: int)` is told
    before them which token of the answer is the first one in doubt.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._given = 0  # tokens of the answer
        self._passed = -1  # of the answer that is made now: its prompt comes first
        self._skips = 0
        self._ended = False
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        """The prompt, int64 [1, n], then each token, int64 [1]: as `generate` has it."""
        if self._ended:
            return
        self._passed += 1
        if self._passed == 0:
            if not self._has_prompt:
                self._has_prompt = True
                self._streamer.put(value)
        elif self._passed > self._skips:
            self._given += 1
            self._streamer.put(value)

    def end(self) -> None:
        """The answer is complete; whatever is made anew after that, the streamer does not hear of."""
        if not self._ended:
            self._ended = True
            self._streamer.end()

    def begin_anew(self, first: int) -> None:
        """The answer is made again; its tokens from `first` on are in doubt."""
        self._skips, self._passed = min(first, self._given), -1
        self._given = self._skips
        if hasattr(self._streamer, "on_doubt"):
            self._streamer.on_doubt(first)


class Seed:
    """The state of torch's random numbers, on the CPU and on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def restore(self) -> None:
        """What is drawn from now on is what was drawn since this was made."""
        torch.set_rng_state(self._cpu)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
