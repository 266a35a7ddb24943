"""`potluck`: all verbs under one name. What a verb needs is imported when it is used, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import click

from protocol.command import PotluckGroup, set_up_logging, tame_libraries


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb's click command is, and what `--help` says of it."""

    module: str
    name: str
    help: str


VERBS = {
    "serve": Verb("peer.cli", "serve", "Share this machine: serve blocks of a model."),
    "doctor": Verb("peer.cli", "doctor", "Find out whether this machine can serve."),
    "chat": Verb("client.cli", "chat", "Talk with the swarm's model."),
    "generate": Verb("client.cli", "generate", "Answer one prompt."),
    "status": Verb("client.cli", "status", "Show models, missing blocks and peers."),
    "dashboard": Verb("dashboard.cli", "serve", "Show a swarm's health as a web page."),
    "api": Verb("client.cli", "api", "Serve the swarm's model over HTTP, as OpenAI's interface."),
    "join-token": Verb("peer.cli", "join_token", "Print a new join token, for a private swarm."),
    "id": Verb("client.cli", "show_id", "Print the id by which peers know your client."),
    "bootstrap": Verb("dht.cli", "bootstrap", "Run a node for others to join through."),
    "demo": Verb("demo.cli", "cli", "Watch a swarm on this machine lose a peer and go on."),
}


class Verbs(PotluckGroup):
    """A group whose commands live in other packages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command: click.Command = getattr(import_module(verb.module), verb.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="potluck")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for everything.")
def main(verbose: int) -> None:
    """Everyone brings a few blocks; together they serve a model that none of them could serve alone.

    \b
    Examples:
      potluck demo
      potluck serve --blocks 10:20
      potluck chat
    """
    tame_libraries()
    set_up_logging(verbose)
