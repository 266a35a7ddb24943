"""`python -m benchmarks list | run NAME... | all | swarm`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Final

import click

from benchmarks.swarm import command as swarm
from protocol.command import tame_libraries

# Name -> (module, what it measures). Each module has `run() -> None`, which prints its report and writes it to `docs/`.
SCENARIOS: Final[dict[str, tuple[str, str]]] = {
    "codecs": ("benchmarks.codecs", "bytes, error and time of each codec; writes docs/codecs.md"),
    "accuracy": ("benchmarks.accuracy", "right answers of the demo model with each codec; writes docs/accuracy.md"),
    "swarm": ("benchmarks.swarm", "coverage, moves and throughput of a simulated swarm; writes docs/swarm.md"),
}


@click.group()
def main() -> None:
    """Potluck's benchmarks. Their bars are ratios taken in one run: compare no seconds across machines."""


@main.command("list")
def list_scenarios() -> None:
    """Say which scenarios there are."""
    for name, (_, what) in SCENARIOS.items():
        click.echo(f"{name:16} {what}")


@main.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(list(SCENARIOS)))
def run(names: tuple[str, ...]) -> None:
    """Run the named scenarios, one after the other."""
    tame_libraries()
    for name in names:
        scenario: Callable[[], None] = import_module(SCENARIOS[name][0]).run
        scenario()


@main.command("all")
@click.pass_context
def run_all(context: click.Context) -> None:
    """Run every scenario."""
    context.invoke(run, names=tuple(SCENARIOS))


main.add_command(swarm)


if __name__ == "__main__":
    main()
