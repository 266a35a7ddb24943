"""What every command line of Potluck shares: options made from a config dataclass, errors as one sentence, logging."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click

from protocol.errors import PotluckError, UserError
from protocol.settings import Setting, settings

Function = TypeVar("Function", bound=Callable[..., Any])

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
NEVER = 1 << 30  # collections of middle-aged objects, before one of old ones


def config_options(config_type: type[Any]) -> Callable[[Function], Function]:
    """One click option per documented field of `config_type`. Unset options arrive as None (or an empty tuple)."""

    def decorate(function: Function) -> Function:
        for setting in reversed(settings(config_type)):
            function = _option(setting)(function)
        return function

    return decorate


def _option(setting: Setting) -> Callable[[Function], Function]:
    shown = "" if setting.default in (None, ()) else f"  [default: {_show(setting.default)}]"
    text = f"{setting.help}{shown} (env {setting.variable})"
    if setting.type is bool:
        negative = "--no-" + setting.name.replace("_", "-")
        return click.option(f"{setting.flag}/{negative}", setting.name, default=None, help=text)
    kind = click.Choice(setting.choices) if setting.choices else _METAVARS[setting.type]
    return click.option(setting.flag, setting.name, default=None, multiple=setting.many, type=kind, help=text)


_METAVARS: dict[type, Any] = {str: str, int: int, float: float}


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


class PotluckGroup(click.Group):
    """A click group that shows errors of our tree as one sentence: exit 2 for the user's mistakes, 1 for the rest."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except PotluckError as error:
            fail(error)


class PotluckCommand(click.Command):
    """A click command that shows errors likewise: for packages with one verb."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except PotluckError as error:
            fail(error)


def fail(error: PotluckError) -> NoReturn:
    """Prints the error's sentence to stderr and exits. With -v (log level DEBUG) the traceback is logged too."""
    logging.getLogger(__name__).debug("failed", exc_info=error)
    click.echo(f"Error: {error.message}", err=True)
    sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE)


def set_up_logging(verbose: int) -> None:
    """Logs to stderr: warnings by default, our own INFO with -v, everything with -vv."""
    logging.basicConfig(
        level=logging.DEBUG if verbose > 1 else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if verbose:
        for name in ("peer", "client", "dashboard", "dht", "slicing", "protocol", "demo"):
            logging.getLogger(name).setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of a great many modules: the garbage collector goes through new objects only. Through all of them,
    again and again, it would take a fifth of the time that torch and transformers need, and find little."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


def tame_libraries() -> None:
    """Sets what libraries read from the environment when imported; called by the command lines only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
