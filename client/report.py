"""A trace for people, as a table; for programs, as a line of JSON; for OpenTelemetry, as spans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.trace import Trace, TracedHop
from protocol.errors import ConfigError

if TYPE_CHECKING:
    from client.model import SwarmModel

TRACER = "potluck.client"


@contextmanager
def reporting(model: SwarmModel, *, shown: bool = False, file: Path | None = None) -> Iterator[None]:
    """What the peers did to the answer that is made within this context is told afterwards, also if it fails.

    Args:
        shown: as a table on stderr.
        file: one more line of JSON there.

    Raises:
        ConfigError: the file cannot be written.
    """
    before = model.trace()
    try:
        yield
    finally:
        trace = model.trace().since(before)
        emit(trace)
        if shown:
            render(trace)
        if file is not None:
            append(trace, file)


def render(trace: Trace) -> None:
    """A table on stderr: the hops in order with their milliseconds per step; then what changed, when and why."""
    console = Console(stderr=True, highlight=False)
    console.print(_sentence(trace))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # 80 columns are not many
    table.add_column("peer", no_wrap=True, overflow="ellipsis")
    table.add_column("blocks", no_wrap=True)
    for title in ("steps", "queue ms", "compute ms", "network ms"):
        table.add_column(title, no_wrap=True, justify="right")
    table.add_column("then", no_wrap=True)
    for hop in trace.hops:
        table.add_row(*_row(hop, is_last=hop.blocks.stop == trace.n_blocks))
    console.print(table)
    for event in trace.events:
        console.print(f"{event.at_s:8.2f} s  {escape(event.text)}", soft_wrap=True)


def _sentence(trace: Trace) -> str:
    per_step_ms = trace.total_s / max(1, trace.steps) * 1e3
    reroutes = "1 reroute" if trace.reroutes == 1 else f"{trace.reroutes} reroutes"
    return f"{trace.steps} steps in {trace.total_s:.2f} s, {per_step_ms:.1f} ms per step, {reroutes}; of a step:"


def _row(hop: TracedHop, *, is_last: bool) -> tuple[str, ...]:
    steps = max(1, hop.steps)
    if not hop.answers:
        then = "left the chain"
    elif is_last:
        then = "answered"
    else:
        then = "relayed" if hop.relayed else "pushed on"
    network = f"{hop.spent.network_ms / hop.timed:.1f}" if hop.timed else "?"
    return (
        escape(hop.name),
        str(hop.blocks),
        str(hop.steps),
        f"{hop.spent.queue_ms / steps:.1f}",
        f"{hop.spent.compute_ms / steps:.1f}",
        network,
        then,
    )


def append(trace: Trace, file: Path) -> None:
    """One more line of JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(trace.as_report(), ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"the trace cannot be written to {file}: {error.strerror}") from error


def emit(trace: Trace) -> None:
    """Spans: one for the answer, within it one for each hop, from its first step to its last.

    Nothing happens where OpenTelemetry is not installed (`potluck[otel]`), or where nobody has told it where spans go.
    """
    try:
        from opentelemetry import trace as telemetry
    except ImportError:
        return
    tracer = telemetry.get_tracer(TRACER, version("potluck"))
    answer = tracer.start_span(
        "answer",
        start_time=_ns(trace, 0.0),
        attributes={
            "potluck.steps": trace.steps,
            "potluck.tokens": trace.tokens,
            "potluck.reroutes": trace.reroutes,
            "potluck.total_s": trace.total_s,
        },
    )
    inside = telemetry.set_span_in_context(answer)
    for event in trace.events:
        answer.add_event(event.text, timestamp=_ns(trace, event.at_s))
    for hop in trace.hops:
        span = tracer.start_span(
            f"hop {hop.blocks}",
            inside,
            start_time=_ns(trace, hop.began_s),
            attributes={
                "potluck.peer_id": hop.peer_id,
                "potluck.name": hop.name,
                "potluck.blocks": str(hop.blocks),
                "potluck.steps": hop.steps,
                "potluck.queue_ms": hop.spent.queue_ms,
                "potluck.compute_ms": hop.spent.compute_ms,
                "potluck.network_ms": hop.spent.network_ms,
                "potluck.answers": hop.answers,
                "potluck.relayed": hop.relayed,
            },
        )
        span.end(_ns(trace, hop.ended_s))
    answer.end(_ns(trace, trace.at_s))


def _ns(trace: Trace, at_s: float) -> int:
    """Nanoseconds since 1970."""
    return int((trace.began_at + at_s) * 1e9)
