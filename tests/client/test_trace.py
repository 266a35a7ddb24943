"""What a recorder makes of steps and changes, and how that is told: as a table, as JSON, as spans."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry import trace as telemetry
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from client.chain import Link
from client.costs import HOP_MS, ways_ms
from client.model import SwarmModel
from client.recorder import MAX_EVENTS, Recorder
from client.report import append, emit, render, reporting
from client.stats import SessionStats
from client.times import Times
from client.trace import Trace, trace_of
from protocol.errors import ConfigError
from protocol.messages import HopTrace
from protocol.span import Span
from tests.client.test_chain import BLANK

BEGAN_AT = 1_700_000_000.0


class Clock:
    """Seconds, set by the test."""

    def __init__(self) -> None:
        self.s = 50.0

    def __call__(self) -> float:
        return self.s


def link(peer_id: str, span: str, name: str = "") -> Link:
    peer = replace(BLANK, peer_id=peer_id, span=Span.parse(span), public_name=name)
    return Link(peer, peer.span)


A, B, C = link("Qm-long-id-of-a", "0:5", "Ada [red]"), link("Qm-long-id-of-b", "5:12"), link("Qm-long-id-of-c", "5:12")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stats() -> SessionStats:
    return SessionStats()


@pytest.fixture
def record(clock: Clock, stats: SessionStats) -> Recorder:
    return Recorder(12, stats, clock, lambda: BEGAN_AT)


def costs(*queue_and_compute_ms: tuple[float, float], starts: tuple[int, ...] = (0, 5)) -> list[HopTrace]:
    return [HopTrace(start, q, c, 0) for start, (q, c) in zip(starts, queue_and_compute_ms, strict=True)]


def rerouted(record: Recorder, clock: Clock, stats: SessionStats) -> None:
    """Two steps over A and B, B lost a second later, one step over A and C."""
    record.chain([A, B], [1.0, 2.0, 1.0], [False, False])
    for _ in range(2):
        clock.s += 0.020
        record.step([A, B], costs((1.0, 3.0), (2.0, 6.0)), 0.020, is_timed=True)
    clock.s += 1.0
    record.chain([A], [1.0, 1.0], [False])
    record.event("B is lost")
    record.chain([A, C], [1.0, 2.0, 1.0], [True, False])
    clock.s += 0.5
    record.step([A, C], costs((1.0, 3.0), (0.0, 4.0)), 0.500, is_timed=False)
    stats.steps, stats.tokens, stats.busy_s, stats.reroutes = 3, 9, 1.54, 1


def test_what_is_left_of_a_step_is_divided_as_the_ways_go(record: Recorder, clock: Clock) -> None:
    record.chain([A, B], [1.0, 2.0, 1.0], [False, False])
    clock.s += 0.020
    record.step([A, B], costs((1.0, 3.0), (2.0, 6.0)), 0.020, is_timed=True)
    a, b = record.trace().chain
    assert astuple(a.spent) == pytest.approx((1.0, 3.0, 2.0)), "8 ms are left"
    assert astuple(b.spent) == pytest.approx((2.0, 6.0, 6.0)), "the way back is the last hop's"
    assert a.lately == a.spent
    assert a.spent.ms + b.spent.ms == pytest.approx(20.0), "together they are the step"
    assert (a.began_s, a.ended_s) == pytest.approx((0.020, 0.020))


def test_where_no_way_is_known_all_are_alike(record: Recorder) -> None:
    record.chain([A, B], [0.0, 0.0, 0.0], [False, False])
    record.step([A, B], costs((0.0, 0.0), (0.0, 0.0)), 0.010, is_timed=True)
    assert [hop.spent.network_ms for hop in record.trace().chain] == pytest.approx([5.0, 5.0])


def test_ways_are_half_round_trips_and_what_a_hop_costs() -> None:
    times = Times(rtts_ms={A.peer.peer_id: 10.0, B.peer.peer_id: 30.0})
    near = replace(B.peer, rtts_ms=((A.peer.peer_id, 4.0),))
    assert ways_ms([A.peer, near], times) == pytest.approx((HOP_MS + 5.0, HOP_MS + 2.0, HOP_MS + 15.0))
    cut = {(A.peer.peer_id, B.peer.peer_id)}
    assert ways_ms([A.peer, near], times, cut)[1] == pytest.approx(HOP_MS + 20.0), "over the client"
    assert ways_ms([], times) == (HOP_MS,)


def test_a_hop_cannot_have_had_a_step_for_longer_than_it_took(record: Recorder) -> None:
    record.chain([A, B], [1.0, 1.0, 1.0], [False, False])
    record.step([A, B], costs((1e308, 1e308), (0.0, 1.0)), 0.010, is_timed=True)
    a, b = record.trace().chain
    assert (astuple(a.spent), astuple(b.spent)) == ((10.0, 10.0, 0.0), (0.0, 1.0, 0.0))
    assert "Infinity" not in json.dumps(record.trace().as_report())


def test_a_hop_that_says_nothing_has_no_times(record: Recorder) -> None:
    record.chain([A, B], [1.0, 1.0, 0.0], [False, False])
    record.step([A, B], costs((0.0, 4.0), starts=(0,)), 0.010, is_timed=True)
    assert [hop.spent.compute_ms for hop in record.trace().chain] == [4.0, 0.0]


def test_steps_that_overlap_or_were_disturbed_are_not_timed(record: Recorder) -> None:
    record.chain([A, B], [1.0, 1.0, 1.0], [False, False])
    record.step([A, B], costs((0.0, 4.0), (0.0, 5.0)), 3.0, is_timed=False)
    (a, b) = record.trace().chain
    assert (a.steps, a.timed, a.lately) == (1, 0, None)
    assert astuple(b.spent) == (0.0, 5.0, 0.0)


def test_a_lost_hop_is_kept_and_answers_no_more(record: Recorder, clock: Clock, stats: SessionStats) -> None:
    rerouted(record, clock, stats)
    trace = trace_of(cast(Any, SimpleNamespace(record=record)))
    assert [(hop.peer_id, hop.answers, hop.steps) for hop in trace.hops] == [
        (A.peer.peer_id, True, 3),
        (C.peer.peer_id, True, 1),
        (B.peer.peer_id, False, 2),
    ]
    assert [hop.relayed for hop in trace.chain] == [True, False]
    assert (trace.steps, trace.tokens, trace.reroutes, trace.total_s, trace.n_blocks) == (3, 9, 1, 1.54, 12)
    (event,) = trace.events
    assert (event.at_s, event.text) == (pytest.approx(1.04), "B is lost")


def test_a_step_of_a_hop_that_has_just_left_is_nobodys(record: Recorder) -> None:
    record.chain([A], [1.0, 1.0], [False])
    record.step([A, B], costs((0.0, 1.0), (0.0, 1.0)), 0.010, is_timed=True)
    assert [hop.peer_id for hop in record.trace().hops] == [A.peer.peer_id]


def test_json_for_watching(record: Recorder, clock: Clock, stats: SessionStats) -> None:
    rerouted(record, clock, stats)
    found = json.loads(json.dumps(record.trace().as_json()))
    assert found["reroutes"] == 1
    assert found["events"] == ["B is lost"]
    assert found["n_blocks"] == 12
    parts = {"queue_ms": 1.0, "compute_ms": 3.0, "network_ms": 2.0}
    assert found["chain"] == [
        {"peer_id": A.peer.peer_id, "name": "Ada [red]", "blocks": "0:5", "relayed": True, "ms": 6.0, **parts},
        {"peer_id": C.peer.peer_id, "name": "…-id-of-c", "blocks": "5:12", "relayed": False, "ms": None},
    ]


def test_one_answer_of_a_conversation(record: Recorder, clock: Clock, stats: SessionStats) -> None:
    rerouted(record, clock, stats)
    before = record.trace()
    clock.s += 60.0  # somebody thinks
    record.event("C is leaving")
    clock.s += 0.030
    record.step([A, C], costs((1.0, 3.0), (0.0, 4.0)), 0.030, is_timed=True)
    stats.steps += 1
    turn = record.trace().since(before)
    assert [(hop.peer_id, hop.steps, hop.spent.compute_ms) for hop in turn.hops] == [
        (A.peer.peer_id, 1, 3.0),
        (C.peer.peer_id, 1, 4.0),
    ], "the one that was lost before had no part in it"
    assert (turn.steps, turn.reroutes, turn.total_s) == (1, 0, 0.0)
    assert [(event.at_s, event.text) for event in turn.events] == [(pytest.approx(60.0), "C is leaving")]
    assert turn.began_at == pytest.approx(BEGAN_AT + 1.54)
    assert turn.at_s == pytest.approx(60.03)


def test_another_sessions_trace_takes_nothing_away(record: Recorder, clock: Clock, stats: SessionStats) -> None:
    rerouted(record, clock, stats)
    other = Recorder(12, stats, clock, lambda: BEGAN_AT + 1).trace()
    assert record.trace().since(other).steps == 3


@pytest.mark.parametrize("address", ["ipv4:192.0.2.7:35379", "ipv6:%5B2001:db8::1%5D:50051"])
def test_no_addresses_in_events(record: Recorder, address: str) -> None:
    why = f"failed to connect to all addresses; last error: UNKNOWN: {address}: Failed to connect to remote host"
    record.event(f"peer abcdefgh (0:5) is lost ({why}); looking for others")
    record.event(f"{address}: Cancelling all calls")
    first, second = (event.text for event in record.trace().events)
    assert first == "peer abcdefgh (0:5) is lost (failed to connect to all addresses); looking for others"
    assert second.strip() == "Cancelling all calls"


def test_events_are_bounded(record: Recorder) -> None:
    for number in range(MAX_EVENTS + 5):
        record.event(str(number))
    assert [event.text for event in record.trace().events][:: MAX_EVENTS - 1] == ["5", str(MAX_EVENTS + 4)]


# ---------------------------------------------------------------------- how it is told


class Traced:
    """A model, as far as its trace is concerned."""

    def __init__(self, record: Recorder) -> None:
        self.trace: Callable[[], Trace] = record.trace


def as_model(record: Recorder) -> SwarmModel:
    return cast(SwarmModel, Traced(record))


def test_a_table_for_people(
    record: Recorder, clock: Clock, stats: SessionStats, capsys: pytest.CaptureFixture[str]
) -> None:
    rerouted(record, clock, stats)
    render(record.trace())
    shown = capsys.readouterr()
    assert shown.out == "", "the answer has stdout for itself"
    sentence, titles, a, c, b, event = shown.err.splitlines()
    assert sentence.startswith("3 steps in 1.54 s, 513.3 ms per step, 1 reroute")
    assert titles.split()[:3] == ["peer", "blocks", "steps"]
    assert a.split() == ["Ada", "[red]", "0:5", "3", "1.0", "3.0", "2.0", "relayed"], "names are not markup"
    assert c.split() == ["…-id-of-c", "5:12", "1", "0.0", "4.0", "?", "answered"]
    assert b.split() == ["…-id-of-b", "5:12", "2", "2.0", "6.0", "6.0", "left", "the", "chain"]
    assert event.split() == ["1.04", "s", "B", "is", "lost"]
    assert all(len(line) <= 80 for line in shown.err.splitlines())


def test_an_answer_is_reported_also_if_it_fails(
    record: Recorder, clock: Clock, stats: SessionStats, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trace.jsonl"
    with pytest.raises(KeyboardInterrupt), reporting(as_model(record), shown=True, file=file):
        rerouted(record, clock, stats)
        raise KeyboardInterrupt
    with reporting(as_model(record), file=file):
        pass
    first, second = map(json.loads, file.read_text().splitlines())
    assert [hop["network_ms"] for hop in first["hops"]] == [4.0, 0.0, 12.0]
    assert first["events"] == [{"at_s": 1.04, "text": "B is lost"}]
    assert (second["steps"], second["reroutes"]) == (0, 0)
    assert "B is lost" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_one_sentence(record: Recorder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        append(record.trace(), tmp_path / "missing" / "trace.jsonl")


def test_spans_for_telemetry(
    record: Recorder, clock: Clock, stats: SessionStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(telemetry, "get_tracer", provider.get_tracer)
    rerouted(record, clock, stats)
    emit(record.trace())
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert [span.name for span in spans.get_finished_spans()] == ["hop 0:5", "hop 5:12", "hop 5:12", "answer"]
    answer, hop = by_name["answer"], by_name["hop 0:5"]
    assert answer.attributes is not None
    assert hop.attributes is not None
    assert (answer.attributes["potluck.steps"], answer.attributes["potluck.reroutes"]) == (3, 1)
    assert (hop.attributes["potluck.peer_id"], hop.attributes["potluck.compute_ms"]) == (A.peer.peer_id, 9.0)
    assert hop.parent is not None
    assert hop.parent.span_id == answer.context.span_id
    assert [event.name for event in answer.events] == ["B is lost"]
    assert answer.start_time == int(BEGAN_AT * 1e9)
    assert answer.end_time == pytest.approx((BEGAN_AT + 1.54) * 1e9)
    assert answer.start_time <= hop.start_time <= hop.end_time <= answer.end_time  # type: ignore[operator]


def test_without_telemetry_nothing_happens(record: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    emit(record.trace())  # installed, and nobody told it where to
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry", None)
    emit(record.trace())
