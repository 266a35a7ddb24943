"""`python -m dashboard`: shows how a swarm is. The page's address goes to stdout, everything else to stderr."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from dashboard.config import SECTION, DashboardConfig
from protocol.command import PotluckCommand, config_options, set_up_logging, tame_libraries
from protocol.join_token import read_join_token
from protocol.loop import new_event_loop
from protocol.settings import load

if TYPE_CHECKING:
    from dht.config import DhtConfig


@click.command(cls=PotluckCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="potluck")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for everything.")
@config_options(DashboardConfig)
def serve(verbose: int, **options: Any) -> None:
    """Show the health of a swarm as a web page, until Ctrl-C. It needs no login and shows no IP addresses.

    \b
    Examples:
      python -m dashboard
      python -m dashboard --host 0.0.0.0 --port 80 --join /dns/swarm.example.org/tcp/31330/p2p/Qm...
    """
    if verbose:
        set_up_logging(verbose)
    tame_libraries()
    config = load(DashboardConfig, options, section=SECTION)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config, _dht_config(config)))


def _dht_config(config: DashboardConfig) -> DhtConfig:
    """The page's DHT settings: what its flags say, the rest from [dht]."""
    from dht.config import DhtConfig

    base = load(DhtConfig, {}, section="dht")
    token = config.join_token or base.join_token
    read_join_token(token)  # a mistake is told at once
    return replace(base, join=config.join, join_token=token, new_swarm=False)


async def _serve(config: DashboardConfig, dht_config: DhtConfig) -> None:
    from dashboard.server import open_page

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with open_page(config, dht_config) as (url, _):
        click.echo(f"health page {url}")
        if config.is_private:
            click.echo("Only this machine sees it; --host 0.0.0.0 shows it to others.", err=True)
        click.echo("Ctrl-C stops it.", err=True)
        await stop.wait()
