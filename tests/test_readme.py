"""What the pages say works. Every command is parsed by the real command line, and run in a swarm of the embedded model,
or it is listed here with the reason why it is not. The pages' Python is run, too.

To be cheap, commands run in this process, but for two that are started as everybody starts them: a peer, and the first
question that is put to it.
"""

from __future__ import annotations

import ast
import asyncio
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
from click.testing import CliRunner

from dht.bootstrap import run_bootstrap
from dht.config import DhtConfig
from dht.node import SwarmNode
from peer.cli import _dht_config
from peer.config import PeerConfig
from peer.server import open_peer
from potluck.reference import PART
from protocol.settings import load, settings

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "docker/README.md")
        ),
        *ROOT.glob("docs/**/*.md"),
    ]
)
UNIT = ROOT / "packaging" / "potluck-peer.service"
COMMAND_LINES = {
    "peer": "peer.cli:cli",
    "client": "client.cli:cli",
    "dht": "dht.cli:main",
    "demo": "demo.cli:cli",
    "dashboard": "dashboard.cli:serve",
    "potluck": "potluck.cli:main",
}
CONFIGS = {
    "peer": "peer.config:PeerConfig",
    "client": "client.config:ClientConfig",
    "dht": "dht.config:DhtConfig",
    "api": "client.api.config:ApiConfig",
    "dashboard": "dashboard.config:DashboardConfig",
}
SECTION_OF = {"serve": "peer", "generate": "client", "chat": "client", "status": "client", "bootstrap": "dht"}
OURS = re.compile(r"(python -m (peer|client|dht|dashboard|demo|potluck|benchmarks)|potluck (?!-)|make )")
HARMLESS = {"source .venv/bin/activate", "nvidia-smi"}
IN_THE_SWARM = re.compile(
    r"(?:echo .* \| )?python -m (client (generate|chat|status|id)\b"
    r"|peer (join-token|doctor|(-v )?serve)\b|dht bootstrap\b)"
)
"""Commands that are run, unless they are among these:"""
NOT_RUN = {
    r"make setup|make demo|make test|python -m demo --keep": "the tests run within the first; tests/demo run the demo",
    r"python -m demo": "tests/demo run it; training takes an hour",
    r"python3 -m venv|\.venv/bin/python -m (pip|peer)|source \.venv|\.venv/bin/python -c": "an installation takes long",
    r".*--model (?!potluck-demo)|.*--device cuda|.*--draft": "no such model, or no GPU, on every machine",
    r".*\bQm\.\.\.": "an address to fill in",
    r"export ": "for the reader's own shell",
    r".*python -m (client api|dashboard)": "tests/test_docker.py runs both",
    r"OPENAI_BASE_URL": "any program of the reader's",
    r".*--trusted-only": "tests/e2e/test_routing.py runs it, with the id of a real peer",
}
"""Commands of bash blocks that are parsed, but not run, and why."""
CONSOLE = {
    "docker ": "no container engine here",
    "cp ": "a step of an installation",
    "mkdir ": "a step of an installation",
    "python3 -m venv /opt/potluck": "a step of an installation",
    "/opt/potluck/bin/pip ": "a step of an installation",
    "systemctl ": "it would change this machine",
    "journalctl ": "it needs the unit",
    "umask ": "tests/e2e/test_private.py makes a token",
    "python -m ": "tests/e2e/test_private.py starts all of these with a token",
    "curl ": "tests/peer/test_metrics.py asks a peer for its metrics",
}
"""What console blocks show, by how it begins, and why it is not even parsed."""
ANSWERS = {
    "--raw": "",  # whatever comes to its mind
    "Spell table.": "t-a-b-l-e",
    "27 + 58": "85",
    "status": "potluck-demo",
    "France": "Paris",
    "client chat": "Paris",
    "client id": "12D3Koo",
    "join-token": "potluck1-",
    "doctor": "can serve",
}
"""What is said to a command in which this occurs, the first that fits."""
AS_A_PROCESS = 'python -m client generate "What is the capital of France?"'
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
            yield Block(str(page.relative_to(ROOT)), begin, language, "\n".join(lines))
            language = None


def commands() -> Iterator[tuple[str, str]]:
    """Every command of a page, with where it stands: in shell blocks; in bare or indented ones and in prose if ours."""
    for page in PAGES:
        for block in fenced(page):
            for line in block.text.replace("\\\n", " ").splitlines():
                is_command = block.language in ("bash", "sh", "shell") and line.strip() not in ("", "#")
                if is_command or (block.language == "" and OURS.match(line)):
                    yield str(block), line.removeprefix("$ ").strip()
        written = PART.sub("", page.read_text())  # by a person: the rest is made of the commands themselves
        prose = re.sub(r"^```.*?^```", "", written, flags=re.M | re.S)
        for span in re.findall(r"`([^`\n]+)`", prose) + re.findall(r"^ {4}(\S.*)", prose, flags=re.M):
            if OURS.match(span) and "..." not in span and "|" not in span:
                yield str(page.relative_to(ROOT)), span


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in fenced(page) if block.language in languages]


def imported(where: str) -> object:
    module, name = where.split(":")
    return getattr(import_module(module), name)


def check_click(package: str, arguments: list[str]) -> None:
    """Parses as the command line itself would, and reads the config; runs nothing."""
    name, params = parsed(package, arguments)
    if section := SECTION_OF.get(name):
        load(imported(CONFIGS[section]), params, section=section, environ={}, path=Path(os.devnull))  # type: ignore[arg-type]


def parsed(package: str, arguments: list[str]) -> tuple[str, dict[str, object]]:
    """The command, and what is said to it."""
    command, name = imported(COMMAND_LINES[package]), package
    arguments = [str(ROOT) if argument == "FOLDER" else argument for argument in arguments]
    while isinstance(command, click.Group):
        context = command.make_context(name, arguments)
        arguments = [*context._protected_args, *context.args]
        if not arguments:
            return name, context.params  # the group itself: `python -m demo`
        found, command, arguments = command.resolve_command(context, arguments)
        assert found and command
        name = found
    assert isinstance(command, click.Command)
    return name, command.make_context(name, arguments).params


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
    if not words or " ".join(words) in HARMLESS or words[0] == "export":
        return
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert arguments and set(arguments) <= set(targets)
    elif program == "potluck":
        check_click("potluck", arguments)
    elif command.startswith("OPENAI_BASE_URL="):
        assert arguments == ["my_program.py"]
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


def test_the_units_command_is_understood() -> None:
    (line,) = re.findall(r"^ExecStart=/opt/potluck/bin/(.+)$", UNIT.read_text(), re.M)
    check(line)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@dataclass(frozen=True)
class Home:
    """A machine on which one peer serves the whole embedded model: its environment, and where others join."""

    environ: dict[str, str]
    maddr: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
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
            yield Home(environ, peer.stdout.readline().removeprefix("join ").strip())
        finally:
            peer.terminate()
            peer.wait(timeout=30)


def bash_commands() -> set[str]:
    """Every command of a bash block of any page."""
    found = set()
    for block in blocks("bash", "sh", "shell"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if command := line.removeprefix("$ ").partition("  #")[0].strip():
                found.add(command)
    return found


def not_run(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in NOT_RUN)


RUN = sorted(command for command in bash_commands() if IN_THE_SWARM.match(command) and not not_run(command))


def test_every_command_is_run_or_known_not_to_be() -> None:
    unknown = [command for command in bash_commands() if command not in RUN and not not_run(command)]
    assert not unknown, "run them, or list them with the reason"
    unused = [pattern for pattern in NOT_RUN if not any(re.match(pattern, command) for command in bash_commands())]
    assert not unused


def test_what_consoles_show_is_known() -> None:
    lines = [line for block in blocks("console") for line in block.text.replace("\\\n", " ").splitlines()]
    shown = [re.sub(r"^[$#] (?:[A-Z_]+=\S+ )?", "", line) for line in lines if line[:2] in ("$ ", "# ")]
    assert not [command for command in shown if not command.startswith(tuple(CONSOLE))]
    assert not [begin for begin in CONSOLE if not any(command.startswith(begin) for command in shown)]


def joined(text: str, swarm: str) -> str:
    """A command as it can be given here: the pages' example of an address is this swarm's, its ports are any."""
    text = re.sub(r"/ip4/192\.0\.2\.7/tcp/31330/p2p/\w+", swarm, text)
    return re.sub(r"(--(?:dht-|metrics-|relay-)?port) \d+", r"\1 0", text)


async def serve(options: dict[str, object]) -> None:
    """As `python -m peer serve`, until it serves."""
    config = load(PeerConfig, options, section="peer")
    said: list[str] = []
    async with open_peer(config, _dht_config(config), say=said.append) as peer:
        assert peer.record().state == "online"
        assert ("metrics at" in " ".join(said)) == (config.metrics_port is not None)
        await peer.leave(config.drain_s, said.append)


async def bootstrap(options: dict[str, object]) -> None:
    """As `python -m dht bootstrap`, until others can join."""
    ready: asyncio.Future[SwarmNode] = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(run_bootstrap(load(DhtConfig, options, section="dht"), ready.set_result))
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=READY_TIMEOUT_S)
    assert ready.done(), running
    assert ready.result().maddrs
    running.cancel()
    await asyncio.wait({running})


def test_the_first_question_is_answered(home: Home) -> None:
    assert AS_A_PROCESS in bash_commands()
    command = [sys.executable, *shlex.split(AS_A_PROCESS)[1:]]
    done = subprocess.run(command, env=home.environ, capture_output=True, text=True, timeout=ANSWER_TIMEOUT_S)
    assert (done.returncode, done.stdout) == (0, "Paris\n"), done.stderr


@pytest.mark.parametrize("command", sorted({*RUN} - {AS_A_PROCESS}))
def test_commands_work(command: str, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in home.environ.items():
        monkeypatch.setenv(name, value)
    before, _, said = joined(command, home.maddr).rpartition(" | ")
    _, _, package, *arguments = shlex.split(said)
    match arguments:
        case ["serve", *rest] | ["-v", "serve", *rest]:
            asyncio.run(serve(parsed("peer", ["serve", *rest])[1]))
        case ["bootstrap", *_]:
            asyncio.run(bootstrap(parsed("dht", arguments)[1]))
        case _:
            typed = " ".join(shlex.split(before)[1:]) if before else "What is the capital of France?\n/exit\n"
            group = imported(COMMAND_LINES[package])
            assert isinstance(group, click.Group)
            done = CliRunner().invoke(group, arguments, input=typed)
            assert done.exit_code == 0, (done.stderr, done.exception)
            (expected, *_) = (answer for question, answer in ANSWERS.items() if question in command)
            assert expected in done.stdout


@pytest.mark.parametrize("block", [block for block in blocks("python") if "openai" not in block.text], ids=str)
def test_python_answers(
    block: Block, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in home.environ.items():
        monkeypatch.setenv(name, value)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out.split()
    assert said == {"README.md": ["42", "Paris", "t-a-b-l-e"], "docs/users.md": ["Rome"]}[block.page]
