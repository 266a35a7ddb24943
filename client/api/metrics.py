"""What the gateway exports for Prometheus, under names that start with `potluck_api_`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from client.api.answer import Answer
    from client.api.answers import Answers
    from client.model import SwarmModel

CONTENT_TYPE = CONTENT_TYPE_LATEST
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
FIRST_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass(frozen=True, slots=True)
class Family:
    """One exported metric: its name as it is scraped, its type and its help text."""

    name: str
    type: str
    help: str


class Metrics:
    """The gateway's own registry: several may live in one process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more family for each, that nobody asks for
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "potluck_api_requests", "HTTP requests, by route and status.", ["route", "status"], registry=registry
        )
        self._request_s = Histogram(
            "potluck_api_request_seconds",
            "Time from a request's arrival to the last byte of its response.",
            ["route"],
            buckets=REQUEST_S,
            registry=registry,
        )
        self._answers = Counter(
            "potluck_api_answers",
            "Answers that have ended, by why: stop, length, cancelled or failed.",
            ["reason"],
            registry=registry,
        )
        self._prompt_tokens = Counter("potluck_api_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._tokens = Counter("potluck_api_answer_tokens", "Tokens that were generated.", registry=registry)
        self._first_s = Histogram(
            "potluck_api_first_token_seconds",
            "Time from a request to the first token of an answer.",
            buckets=FIRST_S,
            registry=registry,
        )
        self._token_s = Histogram(
            "potluck_api_token_seconds",
            "Mean time between two tokens of an answer.",
            buckets=TOKEN_S,
            registry=registry,
        )
        self._reroutes = Counter(
            "potluck_api_reroutes", "Peers that were replaced in the middle of answers.", registry=registry
        )
        self._running = Gauge("potluck_api_answers_running", "Answers that are generated now.", registry=registry)
        self._waiting = Gauge("potluck_api_answers_waiting", "Answers that wait for a thread.", registry=registry)
        self._peers = Gauge("potluck_api_peers", "Peers of the model that take sessions.", registry=registry)
        self._missing = Gauge("potluck_api_missing_blocks", "Blocks of the model without a peer.", registry=registry)
        self._info = Info("potluck_api", "The model that is served, and the version of Potluck.", registry=registry)

    def watch(self, answers: Answers, model: SwarmModel, name: str) -> None:
        """Take what is true at the moment of a scrape from these. `name`: of the model."""
        fingerprint, swarm = model.blocks.fingerprint, model.swarm
        self._running.set_function(lambda: answers.running)
        self._waiting.set_function(lambda: answers.waiting)
        self._peers.set_function(lambda: len(swarm.view.online(fingerprint)))
        self._missing.set_function(lambda: _missing(model))
        self._info.info({"model": name, "version": version("potluck")})

    def note_request(self, route: str, status: int, took_s: float) -> None:
        """A response was sent, or its reader went away."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(took_s)

    def note_answer(self, answer: Answer) -> None:
        """An answer's thread is free again."""
        self._answers.labels(answer.outcome).inc()
        self._reroutes.inc(answer.reroutes)
        timing = answer.timing
        if timing.began_s is not None:
            self._prompt_tokens.inc(len(answer.order.ids))
        if timing.first_s is not None and timing.last_s is not None:
            self._tokens.inc(answer.tokens)
            self._first_s.observe(timing.first_s - timing.asked_s)
            if answer.tokens > 1:
                self._token_s.observe((timing.last_s - timing.first_s) / (answer.tokens - 1))

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


def families() -> tuple[Family, ...]:
    """All that the gateway can export."""
    return tuple(_families(Metrics().registry))


def _families(registry: CollectorRegistry) -> Iterable[Family]:
    endings = {"counter": "_total", "info": "_info"}
    for metric in registry.collect():
        kind = "gauge" if metric.type == "info" else metric.type
        yield Family(metric.name + endings.get(metric.type, ""), kind, metric.documentation)


def _missing(model: SwarmModel) -> int:
    view, fingerprint = model.swarm.view, model.blocks.fingerprint
    if view.model(fingerprint) is None:
        return model.blocks.n_blocks
    return sum(len(span) for span in view.missing(fingerprint))
