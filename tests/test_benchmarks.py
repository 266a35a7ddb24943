"""The measurements run, on a tiny model; what they say of speed is not looked at. The page holds what was found."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from benchmarks import hop, report
from benchmarks.link import link
from benchmarks.result import Bar, Curve, Plot, Result, Table, load, origin, save
from benchmarks.timing import Answer, Spread, slope, total_tokens_per_s

DELAY_S = 0.05
HELLO = b"hello"

RESULT = Result(
    "hop",
    "Cost of a hop",
    "How it was measured.",
    [Bar("per hop", 0.9, "at most", 1.0, "ms"), Bar("over unsplit", 0.8, "at least", 1.0)],
    [Table(("hops", "ms"), [("1", "2.0")])],
    [Plot("hops", "hops", "ms", [Curve.of("Potluck", {1: [2.0, 2.1], 2: [3.0, 3.2]})])],
    {"ms": [1, 2]},
)


@pytest.mark.slow
def test_a_scenario_runs_with_real_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POTLUCK_BENCH_CACHE", str(tmp_path))
    result = hop.measure(quick=True)
    assert [row[0] for row in result.tables[0].rows] == ["unsplit", "1", "2"]
    assert all(value > 0 for values in result.raw["ms"].values() for value in values)


def test_the_page_has_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "performance"
    path = save(RESULT, origin(1.0), folder)
    again, where = load(path)
    assert again.raw == RESULT.raw
    report.write(folder, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| hop | per hop | 0.90 ms | at most 1.00 ms | holds |" in page
    assert "| hop | over unsplit | 0.80x | at least 1.00x | missed by 20% |" in page
    assert where.commit in page
    plot = (folder / "hop.svg").read_bytes()
    report.write(folder, tmp_path / "performance.md")
    assert (folder / "hop.svg").read_bytes() == plot


def test_a_link_delays_and_limits_each_direction() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        echoing = threading.Thread(target=_echo_once, args=(listener,))
        echoing.start()
        with link(listener.getsockname()[1]) as line, socket.create_connection(("127.0.0.1", line.port), 5) as near:
            line.delay_s = DELAY_S
            assert DELAY_S * 2 <= _round_trip_s(near, HELLO) < DELAY_S * 2 + 1
            line.bytes_per_s = 1e6
            assert _round_trip_s(near, bytes(200_000)) >= 0.2 + DELAY_S * 2
        echoing.join()


def _round_trip_s(near: socket.socket, data: bytes) -> float:
    started_s = time.monotonic()
    near.sendall(data)
    came = b""
    while len(came) < len(data):
        came += near.recv(1 << 16)
    assert came == data
    return time.monotonic() - started_s


def _echo_once(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def test_answers_become_figures() -> None:
    first = Answer(0.0, (0.5, 0.6, 0.8), (1, 2, 3), (), 3)
    second = Answer(0.0, (0.5, 1.0), (1, 2), (), 2)
    assert first.first_s == 0.5
    assert first.gaps_s == pytest.approx((0.1, 0.2))
    assert total_tokens_per_s([first, second]) == 5.0
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert slope([1, 2, 4], [1.0, 3.0, 7.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])
