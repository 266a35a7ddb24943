"""Where a setting comes from: flag > environment variable > configuration file > default.

A package's frozen config dataclass owns every default and every help text; this module reads flags, `POTLUCK_*`
variables and the TOML file into it. `protocol.command` makes click options of the same dataclass, the docs list them.
"""

from __future__ import annotations

import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from protocol.errors import ConfigError

Config = TypeVar("Config")

CONFIG_FILE = "config.toml"


def home_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of identities, known peers and state: `$POTLUCK_HOME`, else the platform's place for user data."""
    if home := environ.get("POTLUCK_HOME"):
        return Path(home).expanduser()
    import platformdirs

    return platformdirs.user_data_path("potluck", appauthor=False)


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """The TOML file: `$POTLUCK_CONFIG`, else `config.toml` in the platform's place for configuration (or the home)."""
    if path := environ.get("POTLUCK_CONFIG"):
        return Path(path).expanduser()
    if "POTLUCK_HOME" in environ:
        return home_folder(environ) / CONFIG_FILE
    import platformdirs

    return platformdirs.user_config_path("potluck", appauthor=False) / CONFIG_FILE


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config dataclass, as flags, variables and docs show it."""

    name: str
    type: type  # of one value: str, int, float, bool or Path
    many: bool  # a tuple of values
    optional: bool  # None is allowed, and means "decide by yourself"
    default: Any
    help: str
    choices: tuple[str, ...] | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "POTLUCK_" + self.name.upper()

    def parse(self, raw: object, origin: str) -> Any:
        """`raw` (text from a flag or variable, or a TOML value) as this setting's type.

        Raises:
            ConfigError: names the origin, the value, and what was expected.
        """
        if self.many:
            values = raw.split() if isinstance(raw, str) else raw
            if not isinstance(values, (list, tuple)):
                raise ConfigError(f"{origin}: expected a list, got {raw!r}")
            return tuple(self._parse_one(value, origin) for value in values)
        return self._parse_one(raw, origin)

    def _parse_one(self, raw: object, origin: str) -> Any:
        if self.type is bool:
            return _parse_bool(raw, origin)
        try:
            if isinstance(raw, bool):
                raise ValueError(raw)
            value = self.type(raw)
        except (TypeError, ValueError):
            raise ConfigError(f"{origin}: {raw!r} is not a valid {_NOUNS[self.type]}") from None
        if self.choices is not None and value not in self.choices:
            raise ConfigError(f"{origin}: {raw!r} is none of {', '.join(self.choices)}")
        return value


_NOUNS: dict[type, str] = {int: "whole number", float: "number", str: "text", Path: "path", bool: "yes or no"}


def _parse_bool(raw: object, origin: str) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise ConfigError(f"{origin}: {raw!r} is neither yes nor no")


def settings(config_type: type[Any]) -> tuple[Setting, ...]:
    """The settings of a frozen config dataclass, in its order. Fields without help text are internal, and left out."""
    hints = typing.get_type_hints(config_type)
    return tuple(_setting(f, hints[f.name]) for f in fields(config_type) if "help" in f.metadata)


def _setting(field: Field[Any], hint: Any) -> Setting:
    optional = many = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        variants = [v for v in typing.get_args(hint) if v is not types.NoneType]
        optional, hint = True, variants[0]
    choices: tuple[str, ...] | None = None
    if typing.get_origin(hint) is tuple:
        many, hint = True, typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        choices = tuple(str(v) for v in typing.get_args(hint))
        hint = str
    default = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        default = field.default_factory()
    return Setting(field.name, hint, many, optional, default, field.metadata["help"], choices)


def read_file(path: Path, section: str) -> dict[str, Any]:
    """The `[section]` of the TOML file at `path`; an absent file is an empty one.

    Raises:
        ConfigError: the file cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be used: {error}") from error
    part = table.get(section, {})
    if not isinstance(part, dict):
        raise ConfigError(f"the configuration file {path}: [{section}] must be a table")
    return part


def load(
    config_type: type[Config],
    flags: Mapping[str, Any],
    *,
    section: str,
    environ: Mapping[str, str] = os.environ,
    path: Path | None = None,
) -> Config:
    """A config from flags (those given, i.e. not None and not empty), then environment, then file, then defaults.

    Raises:
        ConfigError: a bad value or an unknown name in the file's section.
    """
    path = config_file(environ) if path is None else path
    in_file = read_file(path, section)
    known = {s.name: s for s in settings(config_type)}
    for name in in_file:
        if name.replace("-", "_") not in known:
            raise ConfigError(f"the configuration file {path}: [{section}] has no setting {name!r}")
    values = dict(_chosen(known, flags, environ, {k.replace("-", "_"): v for k, v in in_file.items()}, path))
    return config_type(**values)


def _chosen(
    known: Mapping[str, Setting],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    in_file: Mapping[str, Any],
    path: Path,
) -> Iterator[tuple[str, Any]]:
    for name, setting in known.items():
        given = flags.get(name)
        if given is not None and given != ():
            yield name, setting.parse(given, setting.flag)
        elif setting.variable in environ:
            yield name, setting.parse(environ[setting.variable], setting.variable)
        elif name in in_file:
            yield name, setting.parse(in_file[name], f"{path}: {name}")
