"""`python -m client`: generate, chat, status, api. The answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from client.api.config import LOOPBACK, ApiConfig
from client.api.config import SECTION as API_SECTION
from client.config import SECTION, ClientConfig
from protocol.command import PotluckGroup, config_options, importing, set_up_logging, tame_libraries
from protocol.errors import ConfigError
from protocol.settings import load

if TYPE_CHECKING:
    from client.model import SwarmModel
    from client.swarm import Swarm
    from client.text import Sampling

SAMPLING_OPTIONS = (
    click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer, in tokens."),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest tokens only."),
    click.option("--top-k", type=int, default=0, show_default=True, help="Sample from so many tokens only; 0: all."),
    click.option("--seed", type=int, default=None, help="Makes sampling repeatable."),
)


def sampling_options(function: Any) -> Any:
    """The options that choose tokens."""
    for option in reversed(SAMPLING_OPTIONS):
        function = option(function)
    return function


def trace_options(function: Any) -> Any:
    """The options that tell where an answer's time went."""
    function = click.option(
        "--trace-file",
        type=click.Path(dir_okay=False, writable=True, path_type=Path),
        default=None,
        help="Add all of that to this file, as one line of JSON for each answer.",
    )(function)
    return click.option(
        "--trace", is_flag=True, help="After an answer, say on stderr what each peer of its chain did to it."
    )(function)


@click.group(cls=PotluckGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="potluck")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for everything.")
def cli(verbose: int) -> None:
    """Use a swarm: ask its model, chat with it, see how it is.

    \b
    Examples:
      python -m client generate "What is the capital of France?"
      python -m client chat --join /ip4/192.0.2.7/tcp/31330/p2p/Qm...
      python -m client status --json
    """
    tame_libraries()
    set_up_logging(verbose)


@cli.command()
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@click.option("--num-beams", type=int, default=1, show_default=True, help="Beam search with so many beams.")
@click.option("--stats", is_flag=True, help="Afterwards, say on stderr which peers answered and how fast.")
@trace_options
@sampling_options
@config_options(ClientConfig)
def generate(
    prompt: str, raw: bool, num_beams: int, stats: bool, trace: bool, trace_file: Path | None, **options: Any
) -> None:
    """Answer PROMPT (- reads it from stdin) and write the answer to stdout.

    \b
    Examples:
      python -m client generate "Spell table."
      echo "What is 27 + 58?" | python -m client generate -
      python -m client generate --raw --temperature 0.8 "Once upon a time"
    """
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise ConfigError("the prompt is empty")
    config = _config(options)
    with _joining(config) as swarm:
        with importing():
            from client.report import reporting
            from client.text import answer, encode_messages, encode_text, load_tokenizer

        sampling = _sampling(options, num_beams=num_beams)
        model = _model(config, swarm)
        tokenizer = load_tokenizer(model.source)
        ids = encode_text(tokenizer, prompt) if raw else encode_messages(tokenizer, [_said("user", prompt)])
        with reporting(model, shown=trace, file=trace_file):
            answer(model, tokenizer, ids, sampling, _write)
            click.echo()
        if stats:
            click.echo(model.summary(), err=True)


@cli.command()
@click.option("--system", default=None, help="What the model is told before the conversation.")
@trace_options
@sampling_options
@config_options(ClientConfig)
def chat(system: str | None, trace: bool, trace_file: Path | None, **options: Any) -> None:
    """Talk with the swarm's model. Ctrl-C stops an answer; /new starts over, /exit or Ctrl-D leaves.

    What was said stays on the peers: each turn sends its new words only.
    """
    config = _config(options)
    with _joining(config) as swarm:
        with importing():
            from client.report import reporting
            from client.text import answer, encode_messages, interruptible, load_tokenizer

        sampling = _sampling(options)
        model = _model(config, swarm)
        tokenizer = load_tokenizer(model.source)
        opening = [_said("system", system)] if system else []
        messages = list(opening)
        hint = f"{model.source.name}: Ctrl-C stops an answer; /new starts over, /exit leaves."
        with model.session():
            while (line := _ask(hint)) is not None:
                hint = ""
                if line == "/new":
                    messages = list(opening)
                elif line:
                    messages.append(_said("user", line))
                    with reporting(model, shown=trace, file=trace_file), interruptible() as stop:
                        try:
                            ids = encode_messages(tokenizer, messages)
                            text = answer(model, tokenizer, ids, sampling, _write, stop)
                        except KeyboardInterrupt:
                            messages.pop()  # nothing came of it
                        else:
                            messages.append(_said("assistant", text))
                        click.echo()


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@config_options(ClientConfig)
def status(as_json: bool, **options: Any) -> None:
    """Show the swarm: its models, which of their blocks are served or missing, and its peers.

    Exit code 0: every block of every model is served; 1: some are missing.
    """
    config = _config(options)

    from client.status import render
    from client.swarm import Swarm
    from dht.summary import summary

    with Swarm.connect(config) as swarm:
        found = summary(swarm.view)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        render(found)
    sys.exit(0 if all(not model["missing"] for model in found["models"]) else 1)


@cli.command()
@config_options(ApiConfig)
@config_options(ClientConfig)
def api(**options: Any) -> None:
    """Serve the swarm's model over HTTP, as OpenAI's interface: for its clients, and for all that can use them.

    \b
    Examples:
      python -m client api
      OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python my_program.py
      POTLUCK_API_KEY=secret python -m client api --host 0.0.0.0
    """
    config, client = load(ApiConfig, options, section=API_SECTION), _config(options)
    if config.host not in LOOPBACK and not config.api_key:
        click.echo(f"Anyone who reaches {config.host} can use this server: give it a key with --api-key.", err=True)

    with importing():
        from client.api.server import serve

    serve(client, config, click.echo, lambda text: click.echo(f"· {text}", err=True))


@cli.command("id")
def show_id() -> None:
    """Print the id by which peers know this machine's client: for their operators' lists."""
    from dht.config import DhtConfig
    from protocol.credentials import ClientKey

    click.echo(ClientKey.load_or_create(load(DhtConfig, {}, section="dht").home_folder).client_id)


def _config(options: dict[str, Any]) -> ClientConfig:
    """What was said, and where the swarm is: so that there is none is told before torch is imported, which takes
    seconds.

    Raises:
        UserError: a setting is wrong, there is no such folder, no swarm was found, or nobody is where it should be.
    """
    from dht.config import DhtConfig
    from dht.locate import locate_swarm
    from dht.probe import require_listener
    from protocol.join_token import read_join_token
    from slicing.source import find_here

    config = load(ClientConfig, options, section=SECTION).with_lists()
    if config.model is not None:
        find_here(config.model)
    base = load(DhtConfig, {"join": config.join, "join_token": config.join_token}, section="dht")

    read_join_token(base.join_token)

    async def locate() -> tuple[str, ...]:
        found = (await locate_swarm(base)).maddrs
        await require_listener(found, base.start_timeout_s)
        return found

    return replace(config, join=asyncio.run(locate()) or config.join)


def _sampling(options: dict[str, Any], **more: Any) -> Sampling:
    from client.text import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return Sampling(**{name: options[name] for name in names}, **more)


def _joining(config: ClientConfig) -> Swarm:
    """The swarm, which is joined while torch is imported."""
    from client.swarm import Swarm

    return Swarm.begin(config)


def _model(config: ClientConfig, swarm: Swarm) -> SwarmModel:
    from client.model import SwarmModelForCausalLM

    return SwarmModelForCausalLM.from_pretrained(
        config=config, swarm=swarm.joined(), on_event=lambda text: click.echo(f"· {text}", err=True)
    )


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _ask(hint: str = "") -> str | None:
    """The next line of the person; None at the end. Whoever has read the hint may press Ctrl-C at once."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            if hint:
                click.echo(hint, err=True)
                hint = ""
            line = input(prompt).strip()
        except KeyboardInterrupt:
            click.echo("\n/exit or Ctrl-D leaves.", err=True)
        except EOFError:
            return None
        else:
            return None if line in ("/exit", "/quit") else line
