"""A swarm's state as a table, for people at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def render(found: dict[str, Any]) -> None:
    """Shows what `dht.summary.summary` gives."""
    console = Console()
    if not found["models"]:
        console.print("This swarm serves no model. Share one with: python -m peer serve")
    for model in found["models"]:
        console.print(_sentence(model))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # 80 columns are not many
        for title in ("peer", "blocks", f"0:{model['n_blocks']}", "state", "weights", "ms/token", "KV free", "up"):
            table.add_column(title, no_wrap=True)
        for peer in model["peers"]:
            step = "?" if peer["step_ms"] is None else f"{peer['step_ms']:.1f}"
            table.add_row(
                escape(peer["public_name"]) or f"…{peer['peer_id'][-8:]}",
                peer["blocks"],
                _bar(peer["blocks"], model["n_blocks"]),
                peer["state"],
                peer["dtype"] if peer["quantization"] == "none" else peer["quantization"],
                step,
                _percent(peer["kv_tokens_left"], peer["kv_tokens_total"]),
                _duration(peer["up_s"]),
            )
        console.print(table)


def _sentence(model: dict[str, Any]) -> str:
    missing = model["missing"]
    if missing:
        return f"[bold]{escape(model['name'])}[/]: [red]blocks {', '.join(missing)} have no peer[/]"
    weakest = min(model["replicas"])
    peers = "peer" if weakest == 1 else "peers"
    return (
        f"[bold]{escape(model['name'])}[/]: all {model['n_blocks']} blocks are served, the weakest by {weakest} {peers}"
    )


def _bar(blocks: str, n_blocks: int, width: int = 12) -> str:
    start, stop = (int(edge) * width // n_blocks for edge in blocks.split(":"))
    return "·" * start + "█" * max(1, stop - start) + "·" * (width - max(stop, start + 1))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole} %" if whole else "none"


def _duration(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{int(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"
