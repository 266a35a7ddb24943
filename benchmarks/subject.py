"""`python -m benchmarks.subject`: one process that is measured, the unsplit model or a client of a swarm.

It is told what to do in lines of JSON on its standard input and answers on its standard output; it waits in between,
so that it takes nothing from whoever is measured next. Times are `time.monotonic()`, which all processes of a
machine share. `benchmarks.arena.Subject` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from protocol.command import tame_libraries

LOOK_S = 0.2  # between two looks for the peers that shall be there


class Clock:
    """A streamer: when which tokens came. `on_token` is told their number so far."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.stamps_s: list[float] = []
        self.tokens: list[int] = []
        self._on_token = on_token
        self._sees_prompt = True

    def put(self, value: Any) -> None:
        if self._sees_prompt:
            self._sees_prompt = False
            return
        now_s = time.monotonic()
        for token in value.flatten().tolist():
            self.stamps_s.append(now_s)
            self.tokens.append(token)
            self._on_token(len(self.tokens))

    def end(self) -> None:
        """Nothing remains to be written."""


class Bench:
    """What the orders are about: at most one model at a time."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say = say
        self._model: Any = None
        self._is_remote = False
        self._stopped = False

    def stop(self) -> None:
        """Ends the answer under way after its next token."""
        self._stopped = True

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carries an order out; its answer."""
        kind = order.pop("do")
        return dict(getattr(self, f"do_{kind}")(**order))

    def do_unsplit(self, folder: str, threads: int) -> dict[str, Any]:
        """The model as transformers loads it, float32."""
        import torch

        from slicing import load_config, model_class, resolve

        self.do_close()
        torch.set_num_threads(threads)
        cls: Any = model_class(load_config(resolve(folder)))
        self._model = cls.from_pretrained(folder, dtype=torch.float32).eval()
        return {}

    def do_client(
        self, folder: str, join: list[str], threads: int, peers: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """A client's head; returns once it sees so many peers that serve."""
        import torch

        from client import SwarmModelForCausalLM

        self.do_close()
        torch.set_num_threads(threads)
        self._model = SwarmModelForCausalLM.from_pretrained(folder, join=join, **settings)
        self._is_remote = True
        return self.do_see(peers)

    def do_see(self, peers: int = 0, ids: Sequence[str] = ()) -> dict[str, Any]:
        """Waits until the client sees so many peers that serve (or more), these among them."""
        while peers or ids:
            view = self._model.swarm.refresh()
            seen = {peer.peer_id for model in view.models for peer in view.online(model.fingerprint)}
            if len(seen) >= peers and seen >= set(ids):
                break
            time.sleep(LOOK_S)
        return {}

    def do_generate(
        self, ids: list[int], new: int, at_s: float | None, say_at: int | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """A greedy answer of `new` tokens. Begins at `at_s`; says when it has `say_at` tokens, and goes on."""
        import torch

        def on_token(n: int) -> None:
            if n == say_at:
                self._say({"tokens": n, "chain": self._chain()})

        def is_stopped(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return torch.full((ids.shape[0],), self._stopped)

        clock, self._stopped = Clock(on_token), False
        prompt = torch.tensor([ids])
        if at_s is not None:
            time.sleep(max(0.0, at_s - time.monotonic()))
        started_s = time.monotonic()
        self._model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            streamer=clock,
            stopping_criteria=[is_stopped],
            **options,
        )
        steps = self._model.blocks.last_stats.steps if self._is_remote else len(clock.tokens)
        return {
            "started_s": started_s,
            "stamps_s": clock.stamps_s,
            "tokens": clock.tokens,
            "chain": self._chain(),
            "steps": steps,
        }

    def do_forward(self, rows: int, tokens: int) -> dict[str, Any]:
        """Seconds of one pass of a seeded batch, without a cache."""
        import torch

        ids = torch.randint(self._model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
        started_s = time.monotonic()
        with torch.inference_mode():
            self._model(input_ids=ids, use_cache=False)
        return {"took_s": time.monotonic() - started_s}

    def do_close(self) -> dict[str, Any]:
        """Leaves the swarm, forgets the model."""
        if self._is_remote:
            self._model.close()
        self._model, self._is_remote = None, False
        return {}

    def _chain(self) -> list[str]:
        return [link.peer.peer_id for link in self._model.chain] if self._is_remote else []


def serve(orders: IO[str], answers: IO[str]) -> None:
    """Orders from one file, answers to the other, until there are no more."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    bench = Bench(say)
    signal.signal(signal.SIGUSR1, lambda *_: bench.stop())
    for line in orders:
        say(bench.do(json.loads(line)) | {"done": True})
    bench.do_close()


def main() -> None:
    """What libraries print goes to standard error: the answers have standard output for themselves."""
    tame_libraries()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        from transformers.utils import logging

        import client  # before the first order, so that no measured time contains it

        assert client.SwarmModelForCausalLM is not None
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
