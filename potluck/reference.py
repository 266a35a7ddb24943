"""`python -m potluck.reference docs/*.md`: fills in those parts of the docs that are read off the code. A test says if
they are behind.

    <!-- generated: commands peer -->          `python -m peer` and its verbs, with their options
    <!-- generated: metrics peer.metrics -->   what that module exports to Prometheus
    <!-- end -->
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
from prometheus_client import Metric

from potluck.cli import VERBS

PROGRAMS = {
    "peer": "peer.cli:cli",
    "client": "client.cli:cli",
    "dht": "dht.cli:main",
    "dashboard": "dashboard.cli:serve",
    "demo": "demo.cli:cli",
}
"""Each is `python -m NAME`."""
METRICS = ("peer.metrics", "client.api.metrics", "dashboard.metrics")
PART = re.compile(r"(?P<begin><!-- generated: (?P<what>\w+) (?P<of>[\w.]+) -->\n).*?(?P<end><!-- end -->)", re.S)


def filled_in(page: str) -> str:
    """A page with its generated parts as they should be."""
    return PART.sub(lambda part: f"{part['begin']}\n{_made(part['what'], part['of'])}\n{part['end']}", page)


def exists(module: str) -> bool:
    """Can it be imported? Looks only at the packages above it."""
    package = module.rpartition(".")[0]
    return (not package or exists(package)) and find_spec(module) is not None


def _made(what: str, of: str) -> str:
    if what == "commands":
        return commands(of)
    if what == "metrics":
        return metrics(of)
    raise ValueError(f"nothing is known of {what!r}: commands PROGRAM, or metrics MODULE")


# ---------------------------------------------------------------------- commands


def commands(program: str) -> str:
    """A section for the program, and one below it for each of its verbs."""
    module, _, attribute = PROGRAMS[program].partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    return "\n".join(_section(command, f"python -m {program}", "##"))


def _section(command: click.Command, called: str, level: str) -> Iterator[str]:
    context = click.Context(command, info_name=called)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"{level} `{called}`\n"
    also = [verb for verb, it in VERBS.items() if getattr(import_module(it.module), it.name) is command]
    yield f"`{called} {usage}`" + "".join(f", also `potluck {verb}`" for verb in also) + "\n"
    yield from _paragraphs(command.help or "")
    yield from _options(command, context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from _section(found, f"{called} {name}", level + "#")


def _paragraphs(text: str) -> Iterator[str]:
    """As click shows them: what follows a \\b is kept line by line. Here, these are examples."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if not paragraph.startswith("\b"):
            yield " ".join(paragraph.split()) + "\n"
            continue
        title, *lines = paragraph.removeprefix("\b").strip().splitlines()
        yield "\n".join([title, "", "```bash", *map(str.strip, lines), "```", ""])


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    records = [param.get_help_record(context) for param in command.get_params(context)]
    rows = [(_cell(flags), text) for flags, text in filter(None, records) if "--help" not in flags]
    if rows:
        yield "| option | |\n|---|---|"
        yield from (f"| `{flags}` | {_cell(text)} |" for flags, text in rows)
        yield ""


# ---------------------------------------------------------------------- metrics


def metrics(module: str) -> str:
    """A table of what `module` exports."""
    rows = ["| name | type | labels | what it says |", "|---|---|---|---|"]
    for name, kind, labels, text in exported(module):
        shown = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {kind} | {shown} | {_cell(text)} |")
    return "\n".join([*rows, ""])


def exported(module: str) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Name, type, labels and help of each metric of `module`: its `families` are Prometheus' own, or alike."""
    for family in import_module(module).families():
        if isinstance(family, Metric):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, tuple(getattr(family, "_labelnames", ())), family.documentation
        else:
            yield family.name, family.type, tuple(getattr(family, "labels", ())), family.help


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


# ----------------------------------------------------------------------


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(pages: tuple[Path, ...]) -> None:
    """Fill in the generated parts of PAGES."""
    for page in pages:
        text = page.read_text()
        if (new := filled_in(text)) != text:
            page.write_text(new)
            click.echo(f"{page} is new")


if __name__ == "__main__":
    main(prog_name="python -m potluck.reference")
