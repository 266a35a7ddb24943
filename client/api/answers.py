"""Answers under way: each an unmodified `generate` in one of a few threads, its text handed to the loop in pieces.

    request ─► Answers.begin ─► waits for a thread ─► generate ─► Follower: token ─► text ─► stops ─► Piece ─► Reply

Whoever asked listens to the `Reply`, and cancels it when nobody listens to themselves any more.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from client.api.answer import Answer, Order, Said
from client.api.errors import Busy
from client.api.follower import Follower
from client.api.prompts import Prompts
from client.api.reply import Reply
from client.api.sampling import choosers, processors
from client.model import SwarmModel
from client.report import emit
from protocol.errors import Doubted, PeerLost, PotluckError

logger = logging.getLogger(__name__)

MOST_WAIT_S = 30.0  # that a caller is told to wait before it tries again


class Answers:
    """All answers under way. Belongs to the event loop.

    Args:
        parallel: answers that are generated at the same time, at most.
        queue: answers that may wait besides.
        when_over: told of each answer when its thread is free again.

    Attributes:
        open: answers that wait or are generated.
    """

    def __init__(
        self, model: SwarmModel, prompts: Prompts, *, parallel: int, queue: int, when_over: Callable[[Answer], None]
    ) -> None:
        self.open: set[Answer] = set()
        self._model = model
        self._prompts = prompts
        self._parallel = parallel
        self._most = parallel + queue
        self._when_over = when_over
        self._threads = ThreadPoolExecutor(parallel, "potluck-answer")

    @property
    def running(self) -> int:
        """Answers that have a thread."""
        return min(len(self.open), self._parallel)

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return len(self.open) - self.running

    def begin(self, orders: Sequence[Order]) -> Reply:
        """All of these answers, or none.

        Raises:
            Busy: too many are waiting.
        """
        if self.open and len(self.open) + len(orders) > self._most:
            raise Busy(f"{self.waiting} answers are waiting already; try again later", retry_after_s=self._wait_s())
        said: asyncio.Queue[Said] = asyncio.Queue()
        answers = [Answer(order, index, said, self._over) for index, order in enumerate(orders)]
        self.open.update(answers)
        for answer in answers:
            answer.future = self._threads.submit(self._generate, answer)
        return Reply(answers, said)

    async def close(self) -> None:
        """Cancels what is under way, and waits for the threads."""
        for answer in list(self.open):
            answer.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def _over(self, answer: Answer) -> None:
        self.open.discard(answer)
        self._when_over(answer)

    def _wait_s(self) -> float:
        """When to try again: the oldest answers have been at it for so long, and new ones will take as long."""
        now_s = time.monotonic()
        return min(MOST_WAIT_S, max(now_s - answer.timing.asked_s for answer in self.open))

    # ------------------------------------------------------------------ in the threads

    def _generate(self, answer: Answer) -> None:
        """The whole life of an answer in its thread."""
        order = answer.order
        try:
            with self._model.session(len(order.ids) + order.max_tokens if order.reserves else 0) as session:
                answer.attach(self._model, session)
                if answer.is_cancelled:
                    return
                follower = Follower(answer, self._prompts)
                try:
                    follower = self._checked(answer, follower)
                finally:
                    answer.last_trace = trace = answer.trace
                    if trace is not None:
                        answer.reroutes = trace.reroutes
                        emit(trace)
                follower.end()
        except concurrent.futures.CancelledError:
            if not answer.is_cancelled:
                answer.say(PeerLost("the swarm's connection ended in the middle of an answer"))
        except PotluckError as error:
            answer.say(error)
        except Exception as error:
            logger.exception("an answer failed")
            answer.say(error)
        finally:
            answer.end()

    def _checked(self, answer: Answer, follower: Follower) -> Follower:
        """Has the answer made; once more, and by others, where peers lied in it and nobody has seen it yet."""
        try:
            self._run(answer.order, follower)
        except Doubted as doubt:
            if answer.order.in_pieces:
                first = max(0, doubt.position + 1 - len(answer.order.ids))
                what = f"the answer is wrong from its token {first} on: a peer lied; ask again, and others compute it"
                raise Doubted(what, position=doubt.position, peer_id=doubt.peer_id) from doubt
            answer.tokens = 0
            follower = Follower(answer, self._prompts)
            self._run(answer.order, follower)
        return follower

    def _run(self, order: Order, follower: Follower) -> None:
        model, prompts, sampling = self._model, self._prompts, order.sampling
        ids = torch.tensor([order.ids], device=model.device)
        chosen = [
            *((follower.probs,) if follower.probs is not None else ()),
            *processors(sampling, len(order.ids), model.device),
            *((order.guard(),) if order.guard is not None else ()),
            *choosers(sampling, model.device),
        ]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_config(order.max_tokens, prompts.ends),
            logits_processor=LogitsProcessorList(chosen),
            stopping_criteria=StoppingCriteriaList([follower]),
            corrects=False,  # what chooses tokens here, and hands them on, is made for one try
        )


def _config(max_tokens: int, ends: frozenset[int]) -> GenerationConfig:
    """Greedy, and nothing that the model's authors recommend besides: `client.api.sampling` sees to that."""
    eos = sorted(ends) or None
    config: GenerationConfig = cast(Any, GenerationConfig)(
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=eos,
        pad_token_id=eos[0] if eos else 0,
        return_dict_in_generate=False,
    )
    return config
