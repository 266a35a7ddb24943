"""What Prometheus is told of a swarm. `families` lists all of it; docs/metrics.md is held against that by a test."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dashboard.health import Health, ModelHealth, Standing
from dashboard.words import without_addresses

MODEL = ("model", "fingerprint")
PEERS_SHOWN = 50
"""Series of single peers; of a larger swarm they would be too many."""

Family = GaugeMetricFamily | CounterMetricFamily


@dataclass(frozen=True, slots=True)
class Seen:
    """What metrics are made of.

    Attributes:
        probes: how often peers were asked, by `answered` or `silent`.
        dropped: records that were dropped since the start, by reason.
        viewers: open live streams.
    """

    health: Health
    probes: Mapping[str, int]
    dropped: Mapping[str, int]
    viewers: int


def _blank() -> dict[str, Family]:
    """All families, without samples, by their short names."""

    def gauge(name: str, text: str, labels: Sequence[str] = MODEL) -> Family:
        return GaugeMetricFamily(f"potluck_{name}", text, labels=labels)

    def counter(name: str, text: str, labels: Sequence[str] = ()) -> Family:
        return CounterMetricFamily(f"potluck_{name}", text, labels=labels)

    return {
        "blocks": gauge("swarm_blocks", "Blocks of the model."),
        "served": gauge("swarm_blocks_served", "Blocks that at least one peer serves which has not failed to answer."),
        "weakest": gauge("swarm_weakest_block_peers", "Peers that serve the block which fewest serve."),
        "peers": gauge("swarm_peers", "Peers by what they are to the swarm.", (*MODEL, "standing")),
        "software": gauge("swarm_software_peers", "Peers by the software that they run.", (*MODEL, "software")),
        "throughput": gauge(
            "swarm_throughput_tokens_per_second", "Tokens that the weakest block can decode in a second, for all."
        ),
        "free": gauge("swarm_free_tokens_per_second", "Of the throughput, what nobody uses."),
        "latency": gauge(
            "swarm_token_latency_seconds", "Expected time of one token over the fastest chain, seen from this page."
        ),
        "kv_free": gauge("swarm_kv_free_tokens", "Cached tokens that every block still has room for."),
        "kv": gauge("swarm_kv_tokens", "Cached tokens that every block has room for in all."),
        "since": gauge(
            "swarm_coverage_changed_timestamp_seconds", "When the blocks began to be all served, or not to be."
        ),
        "answers": gauge(
            "swarm_peer_answers",
            f"1: the peer answers, 0: it does not. Only in swarms of up to {PEERS_SHOWN} peers.",
            (*MODEL, "peer"),
        ),
        "rtt": gauge(
            "swarm_peer_round_trip_seconds",
            f"From this page to the peer and back. Only in swarms of up to {PEERS_SHOWN} peers.",
            (*MODEL, "peer"),
        ),
        "age": gauge("dashboard_view_age_seconds", "Since the swarm was last read; missing before the first time.", ()),
        "viewers": gauge("dashboard_viewers", "Open live streams of the page.", ()),
        "probes": counter("dashboard_probes", "How often peers were asked whether they are there.", ("result",)),
        "dropped": counter("dashboard_dropped_records", "Records of the swarm that were not believed.", ("reason",)),
    }


def families() -> list[Metric]:
    """Name, type and help of everything that is exported."""
    return list(_blank().values())


class SwarmCollector(Collector):
    """Makes all metrics anew for each scrape.

    Args:
        seen: the present state.
    """

    def __init__(self, seen: Callable[[], Seen]) -> None:
        self._seen = seen

    def describe(self) -> list[Metric]:
        return families()

    def collect(self) -> Iterator[Metric]:
        seen, into = self._seen(), _blank()
        has_few = len(seen.health.peers) <= PEERS_SHOWN
        for model in seen.health.models:
            _add_model(into, model)
            if has_few:
                _add_peers(into, model)
        if seen.health.as_of:
            into["age"].add_metric((), max(0.0, time.time() - seen.health.as_of))
        into["viewers"].add_metric((), seen.viewers)
        for result, number in seen.probes.items():
            into["probes"].add_metric((result,), number)
        for reason, number in seen.dropped.items():
            into["dropped"].add_metric((reason,), number)
        yield from into.values()


def registry(seen: Callable[[], Seen]) -> CollectorRegistry:
    """A registry of its own, so that several pages can live in one process."""
    made = CollectorRegistry(auto_describe=False)
    made.register(SwarmCollector(seen))
    return made


def _labels(model: ModelHealth) -> tuple[str, str]:
    return without_addresses(model.name), model.fingerprint


def _add_model(into: Mapping[str, Family], model: ModelHealth) -> None:
    labels = _labels(model)
    values = {
        "blocks": model.n_blocks,
        "served": model.blocks_served,
        "weakest": min(model.replicas),
        "throughput": model.tokens_per_s,
        "free": model.free_tokens_per_s,
        "latency": None if model.token_ms is None else model.token_ms / 1e3,
        "kv_free": model.kv_tokens_left,
        "kv": model.kv_tokens_total,
        "since": model.complete_since,
    }
    for name, value in values.items():
        if value is not None:
            into[name].add_metric(labels, value)
    standings = Counter(peer.standing for peer in model.peers)
    for standing in Standing:
        into["peers"].add_metric((*labels, standing.name.lower()), standings[standing])
    by_software: Counter[str] = Counter()
    for software, number in model.software.items():
        by_software[without_addresses(software)] += number
    for software, number in by_software.items():
        into["software"].add_metric((*labels, software), number)


def _add_peers(into: Mapping[str, Family], model: ModelHealth) -> None:
    labels = _labels(model)
    for peer in model.peers:
        if peer.reach.answers is not None:
            into["answers"].add_metric((*labels, peer.record.peer_id), float(peer.reach.answers))
        if peer.reach.rtt_ms is not None:
            into["rtt"].add_metric((*labels, peer.record.peer_id), peer.reach.rtt_ms / 1e3)
