"""What `doctor` found, for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peer.findings import Finding, can_serve

MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "fault": "[red]fault[/]"}


def render(found: Sequence[Finding]) -> None:
    """Shows each as a line, its remedy below it, and what they come to."""
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for finding in found:
        table.add_row(MARKS[finding.level], finding.check, escape(finding.says))
        if finding.remedy:
            table.add_row("", "", f"[dim]→ {escape(finding.remedy)}[/]")
    console.print(table)
    if can_serve(found):
        console.print("This machine can serve: [bold]python -m peer serve[/], with the same options.")
    else:
        console.print("This machine cannot serve yet: mend what is marked as a fault.")
