"""What Prometheus reads of a peer. Each number is read off the peer when it is asked for, in the thread that answers.
No lock is taken and nothing awaited, so that neither the event loop nor the compute thread is held up.

What a host counts begins anew when the peer moves to other blocks. Prometheus takes that for a restart, which it is.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, NamedTuple

import psutil
from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from peer import memory
from peer.host import SpanHost
from peer.reach.relay import Relay
from peer.standing import Standing
from peer.tally import Histogram
from protocol.errors import ConfigError
from protocol.hosts import address
from protocol.limits import WIRE_VERSION
from slicing.paged import PAGE_TOKENS
from tensor_codecs import dtype_name

PREFIX = "potluck_peer_"
STATES = ("joining", "online", "draining")

Type = Literal["gauge", "counter", "histogram"]
Labels = tuple[str, ...]
Reading = tuple[Labels, float | Histogram]
"""A value, under those of its labels."""


class Family(NamedTuple):
    """A metric, as the docs list it."""

    name: str
    type: Type
    help: str
    labels: Labels


@dataclass(frozen=True, slots=True)
class _Reader:
    """A metric, and how it is read. No reading: the metric does not apply now."""

    family: Family
    read: Callable[[Standing], Iterable[Reading]]

    def metric(self, standing: Standing) -> Metric:
        name, kind, text, labels = self.family
        if kind == "histogram":
            return _histogram(HistogramMetricFamily(name, text, labels=labels), self.read(standing))
        metric = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, text, labels=labels)
        for values, number in self.read(standing):
            assert not isinstance(number, Histogram)
            metric.add_metric(values, number)
        return metric


def _histogram(metric: HistogramMetricFamily, readings: Iterable[Reading]) -> Metric:
    for values, histogram in readings:
        assert isinstance(histogram, Histogram)
        buckets = [("+Inf" if bound == float("inf") else str(bound), count) for bound, count in histogram.buckets]
        metric.add_metric(values, buckets, histogram.sum)
    return metric


def _standing(
    kind: Type, name: str, text: str, read: Callable[[Standing], Iterable[Reading]], labels: Labels = ()
) -> _Reader:
    """Known from the start."""
    return _Reader(Family(PREFIX + name, kind, text, labels), read)


def _host(kind: Type, name: str, text: str, read: Callable[[SpanHost], float | Histogram | None]) -> _Reader:
    """Known while blocks are served."""

    def readings(standing: Standing) -> Iterator[Reading]:
        host = standing.host
        if host is not None and (value := read(host)) is not None:
            yield (), value

    return _Reader(Family(PREFIX + name, kind, text, ()), readings)


def _by(
    label: str, kind: Type, name: str, text: str, read: Callable[[SpanHost], Mapping[str, float | Histogram]]
) -> _Reader:
    """The same, one value for each of a label's."""

    def readings(standing: Standing) -> Iterator[Reading]:
        host = standing.host
        if host is not None:
            yield from (((value,), number) for value, number in read(host).items())

    return _Reader(Family(PREFIX + name, kind, text, (label,)), readings)


def _relay(kind: Type, name: str, text: str, read: Callable[[Relay], float]) -> _Reader:
    """Known while others may be reached through this peer."""

    def readings(standing: Standing) -> Iterator[Reading]:
        if standing.relay is not None:
            yield (), read(standing.relay)

    return _Reader(Family(PREFIX + name, kind, text, ()), readings)


# ---------------------------------------------------------------------- how the longer ones are read


def _build(_: Standing) -> Iterator[Reading]:
    yield (version("potluck"), str(WIRE_VERSION), platform.python_version(), version("torch")), 1


def _span(standing: Standing) -> Iterator[Reading]:
    served, host = standing.served, standing.host
    if host is not None:
        model = host.model
        yield (
            (
                standing.peer_id,
                served.model,
                served.fingerprint,
                str(model.span),
                dtype_name(model.dtype),
                model.quantization,
                str(model.device),
            ),
            1,
        )


def _state(standing: Standing) -> Iterator[Reading]:
    yield from (((state,), float(state == standing.state)) for state in STATES)


def _kv_tokens(host: SpanHost) -> dict[str, float]:
    total, free = host.budget.tokens_total, host.budget.tokens_left
    return {"used": total - free, "free": free}


def _kv_pages(host: SpanHost) -> dict[str, float]:
    total, free = host.budget.tokens_total // PAGE_TOKENS, host.budget.tokens_left // PAGE_TOKENS
    return {"used": total - free, "free": free}


def _received(host: SpanHost) -> dict[str, float]:
    intake = host.house.intake
    return {"begun": intake.begun, "pushed": intake.pushed, "relayed": intake.relayed}


def _relay_refusals(standing: Standing) -> Iterator[Reading]:
    if standing.relay is not None:
        yield from (((reason,), count) for reason, count in dict(standing.relay.refusals).items())


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


READERS: tuple[_Reader, ...] = (
    _standing(
        "gauge",
        "build_info",
        "1; what the peer is made of.",
        _build,
        ("version", "wire_version", "python", "torch"),
    ),
    _standing(
        "gauge",
        "span_info",
        "1 while blocks are served; which, of what, and how they are computed.",
        _span,
        ("peer_id", "model", "fingerprint", "blocks", "dtype", "quantization", "device"),
    ),
    _standing("gauge", "state", "1 for the state that the peer's record gives, 0 for the others.", _state, ("state",)),
    _standing(
        "gauge",
        "start_time_seconds",
        "When the peer started, in seconds since 1970; its uptime is time() less this.",
        lambda standing: [((), standing.started_at)],
    ),
    _standing(
        "gauge",
        "first_block",
        "First block of the span that is served, or about to be.",
        lambda standing: [((), standing.span.start)],
    ),
    _standing(
        "gauge", "blocks", "Blocks that are served, or about to be.", lambda standing: [((), len(standing.span))]
    ),
    _standing("gauge", "model_blocks", "Blocks of the whole model.", lambda standing: [((), standing.served.n_blocks)]),
    _standing(
        "gauge",
        "moving",
        "1 while the peer makes ready to serve other blocks.",
        lambda standing: [((), float(standing.moving_to is not None))],
    ),
    _standing(
        "counter", "moves_total", "Moves to other blocks since the start.", lambda standing: [((), standing.moves)]
    ),
    # -- sessions and room
    _host("gauge", "sessions", "Sessions that are open.", lambda host: len(host.sessions)),
    _host("gauge", "sessions_limit", "Sessions that may be open at once.", lambda host: host.sessions.max_sessions),
    _host("counter", "sessions_opened_total", "Sessions that were opened.", lambda host: host.sessions.opened),
    _host("counter", "sessions_ended_total", "Sessions that were closed or dropped.", lambda host: host.sessions.ended),
    _host(
        "counter",
        "sessions_preempted_total",
        "Sessions that had to give their room up to older ones, to be replayed elsewhere.",
        lambda host: host.sessions.preempted,
    ),
    _by(
        "state",
        "gauge",
        "kv_tokens",
        "Tokens of KV cache over the whole span, used (reserved by sessions) or free; together, the budget.",
        _kv_tokens,
    ),
    _by("state", "gauge", "kv_pages", f"The same in whole pages of {PAGE_TOKENS} tokens.", _kv_pages),
    _host(
        "gauge",
        "kv_unpromised_tokens",
        "Tokens that a new session may hope for, beside what the open ones will grow to.",
        lambda host: host.sessions.tokens_left,
    ),
    _host(
        "gauge", "journal_bytes", "Bytes kept for replacements of next peers.", lambda host: host.journals.bytes_used
    ),
    _host("gauge", "journal_limit_bytes", "The budget for these.", lambda host: host.journals.bytes_total),
    _host(
        "counter",
        "journals_evicted_total",
        "Journals forgotten for lack of room; their sessions would be computed again from further up.",
        lambda host: host.journals.evicted,
    ),
    _host(
        "gauge",
        "message_bytes",
        "Bytes of the steps that arrive, wait or run.",
        lambda host: host.messages.bytes_total - host.messages.bytes_left,
    ),
    _host("gauge", "message_limit_bytes", "The budget for these.", lambda host: host.messages.bytes_total),
    # -- what waits
    _host("gauge", "queue_steps", "Steps that wait or are computed.", lambda host: host.engine.queued),
    _host(
        "gauge",
        "queue_expected_seconds",
        "Time until these are through, at a guess.",
        lambda host: host.engine.expected_ms / 1e3,
    ),
    # -- what is computed
    _by(
        "kind",
        "histogram",
        "step_seconds",
        "From a step's arrival until it is through: prefill (a part of a prompt) or decode (a next token).",
        lambda host: host.tally.step_s,
    ),
    _host("histogram", "step_queue_seconds", "Of this, how long steps waited.", lambda host: host.tally.queued_s),
    _by("kind", "counter", "tokens_total", "Tokens that went through the blocks.", lambda host: host.tally.computed),
    _host("histogram", "pass_seconds", "Time of a pass through the blocks.", lambda host: host.tally.pass_s),
    _host(
        "histogram",
        "pass_steps",
        "Steps that share a pass, each of another session.",
        lambda host: host.tally.pass_steps,
    ),
    _host("histogram", "pass_tokens", "Tokens in a pass.", lambda host: host.tally.pass_tokens),
    _host(
        "gauge",
        "measured_step_seconds",
        "What the peer says in its record: time for one token of one session, through all its blocks.",
        lambda host: _seconds(host.meter.step_ms),
    ),
    _host(
        "gauge",
        "measured_tokens_per_second",
        "What the peer says in its record: tokens of all sessions in a second of computing.",
        lambda host: host.meter.tokens_per_s,
    ),
    # -- what comes and goes
    _by(
        "way",
        "counter",
        "steps_received_total",
        "Steps that arrived: begun (from a client, at the first block), pushed (by the peer before this one), relayed "
        "(by a client, since that peer could not).",
        _received,
    ),
    _by(
        "way",
        "counter",
        "steps_sent_total",
        "Outputs handed on: pushed (to the next peer), relayed (by the client, since this peer could not), answered "
        "(the last block's, to the client).",
        lambda host: dict(host.tally.handed_on),
    ),
    _host(
        "counter", "received_tokens_total", "Tokens of the steps that were taken.", lambda host: host.tally.tokens_in
    ),
    _host("counter", "received_bytes_total", "Bytes of their tensors.", lambda host: host.tally.bytes_in),
    _host("counter", "sent_tokens_total", "Tokens of the outputs handed on.", lambda host: host.tally.tokens_out),
    _host("counter", "sent_bytes_total", "Bytes of their tensors.", lambda host: host.tally.bytes_out),
    _by(
        "reason",
        "counter",
        "refusals_total",
        "Steps and sessions that were refused or failed, by the error's code (see protocol/errors.py).",
        lambda host: dict(host.tally.refusals),
    ),
    _host("gauge", "links", "Streams to peers after this one.", lambda host: len(host.house.links or ())),
    # -- what it does for peers that nobody can dial
    _relay(
        "gauge", "relay_peers", "Peers that are reached through this one's relay.", lambda relay: relay.board.providers
    ),
    _relay(
        "gauge",
        "relay_peers_limit",
        "As many as that it takes.",
        lambda relay: relay.board.providers + relay.places_left,
    ),
    _relay(
        "gauge",
        "relay_connections",
        "Clients' connections to these, those that wait for their peer among them.",
        lambda relay: relay.board.calls,
    ),
    _relay(
        "counter",
        "relay_connections_total",
        "Connections of clients that were joined with a peer's, or this very peer's, by which others try a relay.",
        lambda relay: relay.joined,
    ),
    _relay(
        "counter",
        "relay_meetings_total",
        "Clients and peers that have met here, to do without the relay.",
        lambda relay: relay.met,
    ),
    _relay(
        "counter",
        "relay_bytes_total",
        "Bytes carried, in both directions; each counts once, though it comes in and goes out.",
        lambda relay: relay.carried_bytes,
    ),
    _standing(
        "counter",
        "relay_refusals_total",
        "Connections to the relay that it turned away, by the error's code (see protocol/errors.py).",
        _relay_refusals,
        ("reason",),
    ),
    # -- what it costs the machine
    _standing(
        "gauge",
        "resident_memory_bytes",
        "Memory of the process.",
        lambda _: [((), psutil.Process().memory_info().rss)],
    ),
    _standing("counter", "cpu_seconds_total", "CPU time of the process.", lambda _: [((), _cpu_s())]),
    _host(
        "gauge",
        "device_memory_bytes",
        "Memory that tensors take on the GPU; absent on a CPU.",
        lambda host: memory.allocated_bytes(host.model.device),
    ),
)


def families() -> tuple[Family, ...]:
    """Everything that a peer can export."""
    return tuple(reader.family for reader in READERS)


class PeerCollector(Collector):
    """A peer's metrics, read when they are asked for."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def collect(self) -> Iterator[Metric]:
        return (reader.metric(self._standing) for reader in READERS)

    def describe(self) -> Iterable[Metric]:
        return ()  # names are checked by a test, not when it is registered


@asynccontextmanager
async def serving_metrics(standing: Standing, host: str, port: int) -> AsyncIterator[str]:
    """Metrics over HTTP while the body runs, in threads of their own. Yields their URL.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PeerCollector(standing))
    try:
        server, thread = await asyncio.to_thread(start_http_server, port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics at {address(host, port)}: is another program using it? choose another --metrics-port"
        ) from error
    try:
        yield f"http://{address(host, server.server_port)}/metrics"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)
