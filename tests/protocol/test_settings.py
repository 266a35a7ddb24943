from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from protocol.errors import ConfigError
from protocol.settings import load, settings


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str | None = field(default=None, metadata={"help": "a name"})
    count: int = field(default=3, metadata={"help": "a count"})
    ratio: float = field(default=0.5, metadata={"help": "a ratio"})
    loud: bool = field(default=False, metadata={"help": "noise"})
    join: tuple[str, ...] = field(default=(), metadata={"help": "addresses"})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "a kind"})
    internal: int = 7


def read(tmp_path: Path, toml: str = "", environ: dict[str, str] | None = None, **flags: object) -> Example:
    path = tmp_path / "config.toml"
    path.write_text(toml)
    return load(Example, flags, section="example", environ=environ or {}, path=path)


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    toml, environ = "[example]\ncount = 1\n", {"POTLUCK_COUNT": "2"}
    assert read(tmp_path).count == 3
    assert read(tmp_path, toml).count == 1
    assert read(tmp_path, toml, environ).count == 2
    assert read(tmp_path, toml, environ, count=4).count == 4


def test_every_type(tmp_path: Path) -> None:
    environ = {
        "POTLUCK_NAME": "x", "POTLUCK_RATIO": "2", "POTLUCK_LOUD": "yes", "POTLUCK_JOIN": "p q", "POTLUCK_KIND": "b"
    }  # fmt: skip
    config = read(tmp_path, environ=environ)
    assert config == Example(name="x", ratio=2.0, loud=True, join=("p", "q"), kind="b")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"POTLUCK_COUNT": "many"}, "POTLUCK_COUNT: 'many' is not a valid whole number"),
        ({"POTLUCK_LOUD": "perhaps"}, "neither yes nor no"),
        ({"POTLUCK_KIND": "c"}, "none of a, b"),
    ],
)
def test_a_bad_value_names_its_origin(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, environ=environ)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml.*no setting 'cuont'"):
        read(tmp_path, "[example]\ncuont = 1\n")
    with pytest.raises(ConfigError, match="cannot be used"):
        read(tmp_path, "[example\n")
    with pytest.raises(ConfigError, match="expected a list"):
        read(tmp_path, "[example]\njoin = 3\n")


def test_internal_fields_are_no_settings() -> None:
    assert [s.name for s in settings(Example)] == ["name", "count", "ratio", "loud", "join", "kind"]
    assert settings(Example)[0].flag == "--name"
