"""What the pages say works: commands are checked against the real command lines, the Python of the README is run."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
import pytest

from protocol.settings import load, settings

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
COMMAND_LINES = {
    "peer": "peer.cli:cli",
    "client": "client.cli:cli",
    "dht": "dht.cli:main",
    "demo": "demo.cli:cli",
    "potluck": "potluck.cli:main",
}
CONFIGS = {
    "peer": "peer.config:PeerConfig",
    "client": "client.config:ClientConfig",
    "dht": "dht.config:DhtConfig",
}
SECTION_OF = {"serve": "peer", "generate": "client", "chat": "client", "status": "client", "bootstrap": "dht"}
OURS = re.compile(r"(python -m (peer|client|dht|demo|potluck|benchmarks)|potluck (?!-)|make )")
HARMLESS = {"source .venv/bin/activate", "nvidia-smi"}
READY_TIMEOUT_S = 90
ANSWER_TIMEOUT_S = 60


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fenced(page: Path) -> Iterator[Block]:
    language, begin, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, begin, lines = line[3:].strip(), number, []
        else:
            yield Block(page.name, begin, language, "\n".join(lines))
            language = None


def commands() -> Iterator[tuple[str, str]]:
    """Every command of a page, with where it stands: in shell blocks; in bare or indented ones and in prose if ours."""
    for page in PAGES:
        for block in fenced(page):
            for line in block.text.replace("\\\n", " ").splitlines():
                is_command = block.language in ("bash", "sh", "shell", "console") and line.strip() not in ("", "#")
                if is_command or (block.language == "" and OURS.match(line)):
                    yield str(block), line.removeprefix("$ ").strip()
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for span in re.findall(r"`([^`\n]+)`", prose) + re.findall(r"^ {4}(\S.*)", prose, flags=re.M):
            if OURS.match(span) and "..." not in span and "|" not in span:
                yield page.name, span


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in fenced(page) if block.language in languages]


def imported(where: str) -> object:
    module, name = where.split(":")
    return getattr(import_module(module), name)


def check_click(package: str, arguments: list[str]) -> None:
    """Parses as the command line itself would, and reads the config; runs nothing."""
    command, name = imported(COMMAND_LINES[package]), package
    arguments = [str(ROOT) if argument == "FOLDER" else argument for argument in arguments]
    while isinstance(command, click.Group):
        context = command.make_context(name, arguments)
        arguments = [*context._protected_args, *context.args]
        if not arguments:
            return  # the group itself: `python -m demo`
        found, command, arguments = command.resolve_command(context, arguments)
        assert found and command
        name = found
    assert isinstance(command, click.Command)
    context = command.make_context(name, arguments)
    if section := SECTION_OF.get(name):
        load(imported(CONFIGS[section]), context.params, section=section, environ={}, path=Path(os.devnull))  # type: ignore[arg-type]


def check_pip(arguments: list[str]) -> None:
    assert arguments.pop(0) == "install"
    while arguments:
        match arguments.pop(0):
            case "-c":
                assert (ROOT / arguments.pop(0)).is_file()
            case "-e":
                extras = re.fullmatch(r"\.(?:\[(.+)\])?", arguments.pop(0))
                assert extras
                known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set((extras[1] or "dev").split(",")) <= set(known)
            case "--index-url":
                assert arguments.pop(0).startswith("https://download.pytorch.org/whl/")
            case requirement:
                assert requirement in (ROOT / "constraints.txt").read_text().splitlines()


def check_python(arguments: list[str]) -> None:
    option, what, *rest = arguments
    if option == "-c":
        compile(what, "<page>", "exec")
        return
    assert option == "-m"
    if what == "pip":
        check_pip(rest)
    elif what == "benchmarks":
        assert (ROOT / "benchmarks" / "__main__.py").is_file()
    elif what != "venv":
        check_click(what, rest)


def check(command: str) -> None:
    words = shlex.split(command, comments=True)
    if "|" in words:
        words = words[words.index("|") + 1 :]  # what comes before only writes text
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if not words or " ".join(words) in HARMLESS:
        return
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert arguments and set(arguments) <= set(targets)
    elif program == "potluck":
        check_click("potluck", arguments)
    elif Path(program).name in ("python", "python3"):
        check_python(arguments)
    else:
        pytest.fail(f"this test does not know {program!r}; teach it how to check that it works")


@pytest.mark.parametrize(("where", "command"), sorted(set(commands())))
def test_commands_are_understood(where: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "make coffee",
        "python -m peer serve --block 1:2",
        "python -m peer serve --blocks 1-2",
        "python -m client talk",
        "potluck share",
        "python -m pip install -c constraint.txt -e .",
        "python -m pip install torch==1.0",
        "python -c 'print('",
        "curl example.org",
    ],
)
def test_what_does_not_work_is_noticed(wrong: str) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):  # each in its own way
        check(wrong)


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_settings_exist(block: Block) -> None:
    for section, values in tomllib.loads(block.text).items():
        config = imported(CONFIGS[section])
        assert set(values) <= {setting.name for setting in settings(config)}  # type: ignore[arg-type]


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(import_module(str(node.module)), alias.name), alias.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a machine on which one peer serves the whole embedded model."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "config.toml").write_text(
        '[dht]\nhost = "127.0.0.1"\nlan = false\n[peer]\nhost = "127.0.0.1"\nlan = false\nthreads = 1\n'
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")}
    environ |= {"POTLUCK_HOME": str(folder), "COLUMNS": "100"}
    command = [sys.executable, "-m", "peer", "serve", "--new-swarm"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            assert "serves blocks 0:24 of potluck-demo" in peer.stdout.readline()
            yield environ
        finally:
            peer.terminate()
            peer.wait(timeout=30)


def run(arguments: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_answers(home: dict[str, str]) -> None:
    (block,) = [block for block in blocks("python") if block.page == "README.md"]
    assert run([sys.executable, "-c", block.text], home).split() == ["42", "Paris", "t-a-b-l-e"]


def test_the_commands_of_the_readme_answer(home: dict[str, str]) -> None:
    said = {command for where, command in commands() if where.startswith("README.md:")}
    ask, look = 'python -m client generate "What is the capital of France?"', "python -m client status"
    assert {ask, look} <= said
    assert run([sys.executable, *shlex.split(ask)[1:]], home) == "Paris\n"
    assert "potluck-demo: all 24 blocks are served" in run([sys.executable, *shlex.split(look)[1:]], home)
