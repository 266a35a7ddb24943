"""`python -m peer serve`: share this machine. What others need to join goes to stdout, progress to stderr."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from peer.config import SECTION, PeerConfig
from protocol.command import PotluckGroup, config_options, set_up_logging, tame_libraries
from protocol.descriptors import raise_limit
from protocol.loop import new_event_loop
from protocol.settings import load

if TYPE_CHECKING:
    from dht.config import DhtConfig
    from peer.assembly import Peer


@click.group(cls=PotluckGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="potluck")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for everything.")
def cli(verbose: int) -> None:
    """Share this machine: serve some blocks of a model to a swarm."""
    tame_libraries()
    set_up_logging(verbose)


@cli.command()
@config_options(PeerConfig)
def serve(**options: Any) -> None:
    """Serve blocks of a model until Ctrl-C.

    Without --join it joins the swarm that it finds (on this machine, known from earlier, in the local network), else it
    starts one and prints how others join.

    \b
    Examples:
      python -m peer serve --blocks 10:20
      python -m peer serve --num-blocks 4 --join /ip4/192.0.2.7/tcp/31330/p2p/Qm...
      python -m peer serve --model ~/models/qwen3-8b --device cuda --port 31331
    """
    config = load(PeerConfig, options, section=SECTION)
    raise_limit()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(config, _dht_config(config)))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@config_options(PeerConfig)
def doctor(as_json: bool, **options: Any) -> None:
    """Find out whether this machine can serve with these options, and what to do where it cannot.

    Looks at addresses, ports, memory, GPU, the swarm's directory and clock, and has peers of the swarm try whether they
    reach this machine, directly or through a relay. Announces nothing.

    Exit code 0: it can serve, be it through a relay; 1: it cannot.

    \b
    Examples:
      python -m peer doctor
      python -m peer doctor --port 31331 --dht-port 31330 --join /ip4/192.0.2.7/tcp/31330/p2p/Qm...
    """
    config = load(PeerConfig, options, section=SECTION)

    from peer.doctor import examine
    from peer.findings import can_serve
    from peer.report import render

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        found = runner.run(examine(config, _dht_config(config)))
    serves = can_serve(found)
    if as_json:
        click.echo(json.dumps({"can_serve": serves, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        render(found)
    sys.exit(0 if serves else 1)


def _dht_config(config: PeerConfig) -> DhtConfig:
    """The peer's DHT settings: what the peer's flags say, the rest from [dht]."""
    from dht.config import DhtConfig

    base = load(DhtConfig, {}, section="dht")
    return replace(
        base,
        join=config.join,
        join_token=config.join_token or base.join_token,
        new_swarm=config.new_swarm,
        host=config.host,
        port=config.dht_port,
        announce_host=config.announce_host,
        lan=config.lan and base.lan,
    )


@cli.command("join-token")
def join_token() -> None:
    """Print a new join token, for a swarm that only those who have it can join.

    Keep it in a file that only you can read, and give that to --join-token of peers, clients and bootstrap nodes.
    """
    from protocol.join_token import JoinToken

    click.echo(JoinToken.new().text)


async def _look_first(config: PeerConfig, dht_config: DhtConfig) -> None:
    """A person's mistakes that can be told before torch and hivemind are imported, which takes seconds.

    Raises:
        UserError: the join token or a list has a mistake, a port cannot be listened at, there is no such folder, or
            nobody is where the swarm should be.
    """
    from dht import ports
    from dht.probe import require_listener
    from peer.gate import Entry
    from slicing.source import find_here

    Entry.read(dht_config.join_token, config.allow, config.deny)
    for port in (config.port, dht_config.port, config.relay_port if config.relay else 0):
        ports.bind(config.host, port)
    if config.model is not None:
        find_here(config.model)
    await require_listener(dht_config.join, dht_config.start_timeout_s)


async def _serve(config: PeerConfig, dht_config: DhtConfig) -> None:
    await _look_first(config, dht_config)

    from peer.progress import LoadingBar
    from peer.server import open_peer

    stop = asyncio.Event()
    opening = asyncio.current_task()
    assert opening is not None
    starting = True

    def stopped() -> None:
        if stop.is_set():
            os._exit(128 + signal.SIGTERM)  # a second signal: at once
        stop.set()
        click.echo("leaving the swarm; once more to leave at once", err=True)
        if starting:
            opening.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped)
    with LoadingBar() as bar:
        try:
            async with open_peer(config, dht_config, progress=bar, say=_say) as peer:
                bar.close()
                starting = False
                _show(peer)
                await stop.wait()
                await peer.leave(config.drain_s, _say)
        except asyncio.CancelledError:
            _say("stopped before it served")


def _say(text: str) -> None:
    click.echo(f"· {text}", err=True)


def _show(peer: Peer) -> None:
    """What others need. The first lines are for people, but their form is kept: programs read them."""
    host, record = peer.host, peer.record()
    at = record.addresses[0] if record.addresses else "nowhere"
    click.echo(f"peer {record.peer_id} serves blocks {record.span} of {host.served.model} at {at}")
    click.echo(f"join {peer.join}")
    click.echo(
        f"{host.served.n_blocks} blocks in all; room for {host.budget.tokens_total} tokens; "
        f"{host.meter.step_ms or 0:.1f} ms per token.\n"
        f"Others join with:  python -m peer serve --join {peer.join}\n"
        "On this machine:   python -m client chat\n"
        "Ctrl-C leaves.",
        err=True,
    )
