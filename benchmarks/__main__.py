"""`python -m benchmarks list | run NAME... | all | page | swarm | liars`."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module

import click

from benchmarks.liars import liars
from benchmarks.scenarios import MEASURED, PAGES
from benchmarks.swarm import command as swarm
from protocol.command import tame_libraries

SCENARIOS = MEASURED | PAGES


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
@click.option("--quick", is_flag=True, help="Only see that it works: smaller and fewer, nothing is written.")
def run(names: tuple[str, ...], quick: bool) -> None:
    """Run the named scenarios, one after the other."""
    tame_libraries()
    for name in names:
        module = import_module(SCENARIOS[name][0])
        if name in MEASURED:
            _measure(module, quick)
        elif quick:
            raise click.UsageError(f"{name} has no --quick")
        else:
            module.run()


def _measure(module: object, quick: bool) -> None:
    from benchmarks import report
    from benchmarks.result import origin, save

    started_s = time.monotonic()
    result = module.measure(quick)  # type: ignore[attr-defined]
    where = origin(time.monotonic() - started_s)
    click.echo(report.section(result, where, ""))
    click.echo(report.bars_table([(result, bar) for bar in result.bars]))
    if not quick:
        save(result, where)
        report.write()


@main.command("all")
def run_all() -> None:
    """Run every scenario, each in its own process. Exit code 1: one of them failed; the others ran."""
    failed = [name for name in SCENARIOS if subprocess.call([sys.executable, "-m", "benchmarks", "run", name])]
    if failed:
        click.echo(f"failed: {', '.join(failed)}", err=True)
        sys.exit(1)


@main.command()
def page() -> None:
    """Write docs/performance.md again, from the results that there are."""
    from benchmarks import report

    report.write()


main.add_command(swarm)
main.add_command(liars)


if __name__ == "__main__":
    main()
