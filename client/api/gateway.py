"""What all endpoints share: the model and its tokenizer, the answers under way, and what requests mean to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.api.answer import Answer
from client.api.answers import Answers
from client.api.config import ApiConfig
from client.api.errors import BadRequest
from client.api.grammar import Grammars
from client.api.metrics import Metrics
from client.api.prompts import Prompts, context_of, ends_of
from client.api.schemas import Common
from client.model import SwarmModel
from client.text import load_tokenizer
from protocol.errors import SwarmNotFound
from slicing import ModelSource

LOOK_S = 1.0  # between two looks at a swarm that is not whole
TRACE_S = 0.25  # between two traces in a stream


@dataclass(frozen=True, slots=True)
class Gateway:
    """One model behind the HTTP interface. `name`: of the model, in answers."""

    model: SwarmModel
    name: str
    prompts: Prompts
    grammars: Grammars
    answers: Answers
    config: ApiConfig
    metrics: Metrics
    created: int

    @property
    def fingerprint(self) -> str:
        """OpenAI's word for which weights and which software answered."""
        return f"fp_{self.model.blocks.fingerprint[:12]}"

    def head(self, kind: str, answer_id: str, created: int) -> dict[str, Any]:
        """What each object of an answer, or of a part of it, begins with. `created`: seconds since 1970."""
        return {
            "id": answer_id,
            "object": kind,
            "created": created,
            "model": self.name,
            "system_fingerprint": self.fingerprint,
        }

    def check(self, request: Common) -> None:
        """Can this gateway do what all kinds of requests may ask? One that names no model means this one.

        Raises:
            BadRequest: it means another model, or has a bias for tokens that there are none of.
        """
        if request.model is not None:
            self.check_model(request.model)
        if request.logit_bias:
            self.prompts.of_ids(tuple(request.logit_bias), param="logit_bias")

    def check_model(self, wanted: str) -> None:
        """Is this model meant?

        Raises:
            BadRequest: another one is.
        """
        if wanted not in (self.name, self.model.source.name):
            raise BadRequest(
                f"the model {wanted!r} is not served here; {self.name!r} is",
                param="model",
                reason="model_not_found",
                status=404,
            )

    def tracer(self, request: Common, answers: Sequence[Answer]) -> Tracer | None:
        """Traces for the request's stream, if it asks for them."""
        return Tracer(answers[0]) if request.potluck.trace else None

    async def missing(self) -> list[str]:
        """The blocks that no peer serves; all of them, if the swarm does not know the model.

        Looks again, now and then, as long as there are some.
        """
        swarm, fingerprint = self.model.swarm, self.model.blocks.fingerprint
        view = swarm.view
        if not view.is_whole(fingerprint) and time.time() - view.as_of > LOOK_S:
            try:
                view = await asyncio.to_thread(swarm.refresh)
            except SwarmNotFound:
                view = swarm.view  # what it knew is true until it expires
        if view.model(fingerprint) is None:
            return [f"0:{self.model.blocks.n_blocks}"]
        return [str(span) for span in view.missing(fingerprint)]


class Tracer:
    """Traces of one answer, for its stream: at the start, on change, at the end, not too often."""

    every_s = TRACE_S

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._said: dict[str, Any] | None = None
        self._at_s = 0.0

    def look(self, *, last: bool = False) -> dict[str, Any] | None:
        """What is to be said now; None: nothing new, or it is too soon."""
        now_s = time.monotonic()
        if now_s - self._at_s < TRACE_S and not last:
            return None
        found = self._answer.trace
        if found is None:
            return None
        self._at_s = now_s
        trace = found.as_json() | {"tokens": self._answer.tokens}
        if trace == self._said and not last:
            return None
        self._said = trace
        return trace


def open_gateway(model: SwarmModel, config: ApiConfig) -> Gateway:
    """A gateway to a joined model. Its threads end with `answers.close()`.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model.source)
    text_config = model.config.get_text_config()
    ends = ends_of(model.generation_config, tokenizer)
    prompts = Prompts(tokenizer, text_config.vocab_size, context_of(text_config), ends)
    metrics = Metrics()
    answers = Answers(model, prompts, parallel=config.parallel, queue=config.queue, when_over=metrics.note_answer)
    name = _shown_name(model.source)
    metrics.watch(answers, model, name)
    grammars, now = Grammars(prompts), int(time.time())
    return Gateway(model, name, prompts, grammars, answers, config, metrics, now)


def _shown_name(source: ModelSource) -> str:
    """As the user wrote it; of a folder its last part, since where it is concerns nobody."""
    folder = Path(source.name).expanduser()
    return folder.resolve().name if folder.is_dir() else source.name
