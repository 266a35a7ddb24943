"""How the demo looks: what `demo.cli` prints, made here and printed there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo.swarm import MODEL, LocalSwarm
from protocol.span import Span

if TYPE_CHECKING:
    from client.chain import Link

PLAIN_WIDTH = 200  # columns where the output is no terminal


def new_console() -> Console:
    """Colours and a live table on a terminal; elsewhere plain text in long lines."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without these characters
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def heading(text: str) -> Text:
    """The title of a step."""
    return Text(f"\n{text}", style="bold cyan")


def short(peer_id: str) -> str:
    """A peer's name: the end of its id."""
    return f"…{peer_id[-8:]}"


def chain_line(links: tuple[Link, ...]) -> str:
    """A chain in the order in which activations pass it."""
    hops = " → ".join(f"{short(link.peer.peer_id)} {link.span}" for link in links)
    return f"   ✓ you → {hops} → you"


def grid(swarm: LocalSwarm, spans: tuple[Span, ...]) -> Table:
    """Peers x blocks; `spans` are shown before their peers are there, too."""
    n_blocks = spans[-1].stop
    table = Table("peer", "pid", "blocks", f"0:{n_blocks}", "state", box=None, padding=(0, 2, 0, 1))
    for node in sorted(swarm.peers.values(), key=lambda node: node.span):
        style = "green" if node.runs else "red"
        state = Text(f"online after {node.ready_s:.1f} s" if node.runs else "killed", style=style)
        table.add_row(short(node.peer_id), str(node.pid), str(node.span), _bar(node.span, n_blocks, style), state)
    taken = {node.span for node in swarm.peers.values()}
    for span in spans:
        if span not in taken:
            table.add_row("", "", str(span), _bar(span, n_blocks, "dim"), Text("starting", style="dim"))
    return table


def _bar(span: Span, n_blocks: int, style: str) -> Text:
    return Text.assemble("·" * span.start, ("█" * len(span), style), "·" * (n_blocks - span.stop))


def what_to_try(swarm: LocalSwarm) -> Iterator[str]:
    """Command lines for another terminal, while the swarm stays."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    command = f"POTLUCK_HOME={shlex.quote(str(swarm.home))} {shlex.quote(str(python))} -m"
    model = "" if swarm.model == MODEL else f" --model {shlex.quote(swarm.model)}"
    alive = next(node for node in swarm.peers.values() if node.runs)
    for what, line in (
        ("talk with it", f"{command} client chat{model}"),
        ("ask one thing", f'{command} client generate{model} "Sort these words: river, candle, piano, apple."'),
        ("who serves what", f"{command} client status"),
        ("share more", f"{command} peer serve{model} --blocks {alive.span}"),
        ("another accident", f"kill -9 {alive.pid}   # it serves {alive.span}"),
    ):
        yield f"   {what + ':':18}{line}"
