"""`python -m dht`: the DHT's own commands."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

import click

from dht import ports
from dht.config import DhtConfig
from dht.maddr import Maddr
from protocol.command import PotluckGroup, config_options, set_up_logging, tame_libraries
from protocol.join_token import read_join_token
from protocol.settings import load


@click.group(cls=PotluckGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", count=True, help="Say more; -vv: everything.")
def main(verbose: int) -> None:
    """Run nodes of the swarm's directory."""
    set_up_logging(verbose)


@main.command()
@config_options(DhtConfig)
def bootstrap(**flags: Any) -> None:
    """Run a node for others to join through. Its address stays the same over restarts."""
    config = load(DhtConfig, flags, section="dht")
    ports.bind(config.host, config.port)  # mistakes are told before hivemind is imported
    for text in config.join:
        Maddr.require(text)
    read_join_token(config.join_token)
    tame_libraries()
    asyncio.run(_until_signal(config))


async def _until_signal(config: DhtConfig) -> None:
    from dht.bootstrap import run_bootstrap  # imports hivemind, which only this verb needs
    from dht.node import SwarmNode

    def show(node: SwarmNode) -> None:
        maddrs = [maddr for text in node.maddrs if (maddr := Maddr.parse(text)) is not None]
        shown = [str(maddr) for maddr in maddrs if not maddr.is_loopback] or [str(maddr) for maddr in maddrs]
        click.echo("The bootstrap node runs. Others join with --join and one of these addresses:", err=True)
        click.echo("\n".join(shown))
        click.echo("Ctrl-C stops it.", err=True)

    running = asyncio.create_task(run_bootstrap(config, show), name="bootstrap")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
