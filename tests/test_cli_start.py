"""Command lines start fast: nothing heavy is imported before a verb needs it; and `potluck` gathers all verbs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import click
import pytest
from click.testing import CliRunner

from potluck.cli import VERBS, main

HEAVY = ("torch", "transformers", "hivemind", "numpy", "grpc", "bitsandbytes", "huggingface_hub", "tensor_codecs")
TIMEOUT_S = 60


def heavy_after(code: str) -> tuple[list[str], str]:
    """Which heavy modules a fresh interpreter has loaded after `code`, and what it wrote before."""
    program = f"import json, sys\n{code}\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(before)


@pytest.mark.parametrize("module", ["potluck.cli", "peer.cli", "client.cli", "dashboard.cli", "dht.cli", "demo.cli"])
def test_command_lines_import_nothing_heavy(module: str) -> None:
    assert heavy_after(f"import {module}") == ([], "")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["demo", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    loaded, shown = heavy_after(f"from potluck.cli import main\nmain({arguments}, standalone_mode=False)")
    assert loaded == []
    assert "Usage" in shown or version("potluck") in shown


def test_the_list_of_verbs_imports_no_verb() -> None:
    modules = {verb.module for verb in VERBS.values()}
    code = "from potluck.cli import main\nmain(['--help'], standalone_mode=False)\n"
    _, shown = heavy_after(f"{code}assert not {modules} & {{*sys.modules}}")
    assert all(f"  {name} " in shown for name in VERBS)


@pytest.mark.parametrize(
    "module", ["client.status", "client.swarm", "dashboard.server", "dht.bootstrap", "peer.server"]
)
def test_a_swarm_is_joined_without_torch(module: str) -> None:
    loaded, _ = heavy_after(f"import {module}")
    assert not {"torch", "transformers", "numpy", "tensor_codecs"} & {*loaded}, loaded


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert f"{name} [OPTIONS]" in result.output


def test_no_verb_is_left_out() -> None:
    verbs = {
        command
        for group in (import_module("peer.cli").cli, import_module("client.cli").cli, import_module("dht.cli").main)
        if isinstance(group, click.Group)
        for command in group.commands
    }
    assert verbs | {"demo", "dashboard"} == set(VERBS)


def test_an_unknown_verb_is_refused() -> None:
    result = CliRunner().invoke(main, ["share"])
    assert result.exit_code == 2
    assert "share" in result.output


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "potluck", "--version"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0
    assert version("potluck") in done.stdout
