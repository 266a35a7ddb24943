"""What Prometheus reads of a peer, over HTTP: true numbers, proper names, at no cost to who serves."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from client.blame import Blame
from client.config import ClientConfig
from client.session import Session
from client.spec import SessionSpec
from peer.config import PeerConfig
from peer.host import SpanHost
from peer.metrics import families, serving_metrics
from peer.standing import Standing
from peer.tally import Histogram
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import ConfigError, PeerFull, PotluckError
from protocol.journal import Entry, Part
from protocol.messages import HIDDEN, Open, TensorSpec
from protocol.span import Span
from tensor_codecs import codec
from tests.harness import KnownPeers, identity, open_host, record_of
from tests.slicing.architectures import N_BLOCKS, make_checkpoint

SCRAPE_S = 0.020
PROMPT, DECODED = 20, 4
CUT = N_BLOCKS // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


@dataclass
class Watched:
    """A peer without a DHT, and where its metrics are."""

    host: SpanHost
    standing: Standing
    url: str

    def text(self) -> str:
        with urlopen(self.url, timeout=10) as answer:
            assert answer.status == 200
            text: str = answer.read().decode()
        return text

    def scrape(self) -> dict[str, float]:
        """All samples, as `name{label=value}`."""
        return {
            sample.name + "".join(f"{{{name}={value}}}" for name, value in sample.labels.items()): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
        }

    async def read(self) -> dict[str, float]:
        return await asyncio.to_thread(self.scrape)


@asynccontextmanager
async def watched(host: SpanHost) -> AsyncIterator[Watched]:
    config = PeerConfig(host="127.0.0.1", lan=False)
    standing = Standing(host.identity, host.served, host.model.span, config, lambda: ["127.0.0.1"])
    standing.serve(host, {})
    async with serving_metrics(standing, "127.0.0.1", 0) as url:
        yield Watched(host, standing, url)


def entry(hidden: Tensor, position: int) -> Entry:
    payload = codec("none").encode(hidden)
    spec = TensorSpec(HIDDEN, "none", "float32", tuple(hidden.shape), len(payload))
    return Entry(position, hidden.shape[-2], 1, (Part(spec, payload),))


def opening(host: SpanHost, number: int) -> Open:
    return Open(number.to_bytes(16, "big"), 1, host.served.fingerprint, host.model.span, "none", 1, 1)


async def test_an_answer_is_counted_where_it_goes(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        spans = (Span(0, CUT), Span(CUT, N_BLOCKS))
        hosts = [await stack.enter_async_context(open_host(folder, span, i)) for i, span in enumerate(spans)]
        first, last = [await stack.enter_async_context(watched(host)) for host in hosts]
        known = KnownPeers([record_of(host) for host in hosts])
        stack.push_async_callback(known.close)
        config = ClientConfig(codec="none")
        spec = SessionSpec(hosts[0].served.fingerprint, N_BLOCKS, codec="none", batch=1, max_tokens=64)
        session = Session(spec, known, Blame(config.avoid_s), config, lambda event: None)
        width = hosts[0].model.hidden_size
        await session.step(entry(torch.randn(1, PROMPT, width), 0))
        for position in range(PROMPT, PROMPT + DECODED):
            await session.step(entry(torch.randn(1, 1, width), position))
        steps, tokens = 1 + DECODED, PROMPT + DECODED

        found, at_end = await first.read(), await last.read()
        assert found["potluck_peer_steps_received_total{way=begun}"] == steps
        assert found["potluck_peer_steps_sent_total{way=pushed}"] == steps
        assert at_end["potluck_peer_steps_received_total{way=pushed}"] == steps
        assert at_end["potluck_peer_steps_sent_total{way=answered}"] == steps
        for numbers in (found, at_end):
            assert numbers["potluck_peer_tokens_total{kind=prefill}"] == PROMPT
            assert numbers["potluck_peer_tokens_total{kind=decode}"] == DECODED
            assert numbers["potluck_peer_step_seconds_count{kind=prefill}"] == 1
            assert numbers["potluck_peer_step_seconds_count{kind=decode}"] == DECODED
            assert numbers["potluck_peer_pass_seconds_count"] == numbers["potluck_peer_pass_steps_sum"] == steps
            assert numbers["potluck_peer_pass_tokens_sum"] == tokens
            assert numbers["potluck_peer_received_tokens_total"] == numbers["potluck_peer_sent_tokens_total"] == tokens
            assert numbers["potluck_peer_received_bytes_total"] == tokens * width * 4
            assert numbers["potluck_peer_sessions"] == numbers["potluck_peer_sessions_opened_total"] == 1
            assert numbers["potluck_peer_kv_tokens{state=used}"] >= tokens
            assert numbers["potluck_peer_kv_pages{state=used}"] == 1
            assert 0 < numbers["potluck_peer_step_seconds_sum{kind=prefill}"] < 60
        assert found["potluck_peer_links"] == 1 and at_end["potluck_peer_links"] == 0
        assert found["potluck_peer_journal_bytes"] == tokens * width * 4
        total = found["potluck_peer_kv_tokens{state=used}"] + found["potluck_peer_kv_tokens{state=free}"]
        assert total == hosts[0].budget.tokens_total

        await session.close()
        found = await first.read()
        assert found["potluck_peer_sessions_ended_total"] == 1
        assert found["potluck_peer_sessions"] == found["potluck_peer_kv_tokens{state=used}"] == 0


async def test_refusals_are_counted_by_their_reason(folder: Path) -> None:
    async with open_host(folder, Span(0, N_BLOCKS), max_sessions=1) as host, watched(host) as peer:
        known = KnownPeers([record_of(host)])
        stub = pb_grpc.PeerStub(known.channel(record_of(host)))
        calls = [stub.Infer() for _ in range(2)]  # by hand: a client would go elsewhere
        for number, call in enumerate(calls):
            await call.write(opening(host, number).to_proto())
            await call.read()
        found = await peer.read()
        assert found["potluck_peer_refusals_total{reason=" + PeerFull.code + "}"] == 1
        for call in calls:
            call.cancel()
        await known.close()


async def test_every_family_is_there_and_named_by_the_conventions(folder: Path) -> None:
    async with open_host(folder, Span(0, N_BLOCKS)) as host, watched(host) as peer:
        text = await asyncio.to_thread(peer.text)
        told = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.M))
        assert told == {family.name: family.type for family in families()}
        for family in families():
            assert re.fullmatch(r"potluck_peer_[a-z][a-z_]*[a-z]", family.name)
            assert family.name.endswith("_total") == (family.type == "counter"), family
            assert family.help[0].isupper() or family.help[0].isdigit(), family
            assert family.help.endswith("."), family
            assert not re.search(r"_(ms|mib|kb|percent|count|sum|bucket)\b", family.name), "base units"
        assert len({family.name for family in families()}) == len(families())


async def test_while_nothing_is_served_the_rest_is_told(folder: Path) -> None:
    async with open_host(folder, Span(0, N_BLOCKS)) as host, watched(host) as peer:
        assert (await peer.read())["potluck_peer_state{state=online}"] == 1
        peer.standing.claim(Span(0, CUT))
        found = await peer.read()
        assert found["potluck_peer_state{state=joining}"] == 1 and found["potluck_peer_state{state=online}"] == 0
        assert found["potluck_peer_blocks"] == CUT
        assert "potluck_peer_sessions" not in found
        assert time.time() - found["potluck_peer_start_time_seconds"] < 60


async def test_a_scrape_is_quick_and_holds_up_nobody(folder: Path) -> None:
    async with open_host(folder, Span(0, N_BLOCKS)) as host, watched(host) as peer:
        for number in range(200):
            host.sessions.open(opening(host, number), 0.0)
        # The event loop is here, and so cannot help; nor could anybody who needs one of these locks.
        took_s = []
        with host.sessions._lock, host.journals._lock:
            for _ in range(15):
                started_s = time.perf_counter()
                assert peer.scrape()["potluck_peer_sessions"] == 200
                took_s.append(time.perf_counter() - started_s)
        assert statistics.median(took_s) <= SCRAPE_S, took_s  # reading what came included


async def test_a_taken_port_is_the_users_mistake(folder: Path) -> None:
    config = PeerConfig(host="127.0.0.1", lan=False)
    async with open_host(folder, Span(0, N_BLOCKS)) as host:
        standing = Standing(identity(0), host.served, host.model.span, config, lambda: ["127.0.0.1"])
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            with pytest.raises(ConfigError, match="choose another --metrics-port"):
                async with serving_metrics(standing, "127.0.0.1", other.getsockname()[1]):
                    pass


def test_a_histogram_counts_what_is_at_most_as_large() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert histogram.buckets == [(1.0, 2), (2.0, 3), (math.inf, 4)]
    assert histogram.sum == 12.0


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(PotluckError, match="metrics-port"):
        PeerConfig(metrics_port=port)
