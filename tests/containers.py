"""The services of docker/compose.yaml as processes: each container's command, in a clean folder, with the environment
that the image and compose.yaml give it. Only what a container would have to itself is replaced: ports, folders, names.
"""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from dht.ports import bind
from tests.processes import END_S, START_S, nothing_left_over, until

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PORTS = re.compile(r"\b(3133[01]|31340|8000|8330)\b")
"""In the containers; each has them to itself."""
LOOK_EVERY_S = 0.1

trouble = runpy.run_path(str(DOCKER / "healthcheck.py"))["trouble"]


def compose(name: str = "compose.yaml", **variables: str) -> dict[str, Any]:
    """A compose file with its variables filled in, as an engine does it."""

    def value(match: re.Match[str]) -> str:
        given = variables.get(match["name"], "")
        if not given and match["how"] == ":?":
            raise ValueError(f"{match['name']}: {match['rest']}")
        return given or match["rest"] or ""

    text = (DOCKER / name).read_text()
    found: dict[str, Any] = yaml.safe_load(
        re.sub(r"\$\{(?P<name>\w+)(?:(?P<how>:[-?])(?P<rest>[^}]*))?\}", value, text)
    )
    return found


def ours(services: Mapping[str, Any]) -> dict[str, Any]:
    """Those that run this repository's image."""
    return {name: service for name, service in services.items() if "build" in service}


def image_instructions() -> list[tuple[str, str]]:
    """Of the image's last stage: each instruction and what it says, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    last = re.split(r"^FROM ", text, flags=re.M)[-1]
    pairs = [line.partition(" ") for line in last.splitlines()[1:] if line.strip()]
    return [(name, rest.strip()) for name, _, rest in pairs]


def image_environment() -> dict[str, str]:
    """What the image sets."""
    words = [word for name, rest in image_instructions() if name == "ENV" for word in shlex.split(rest)]
    return dict(word.partition("=")[::2] for word in words)


@dataclass
class Service:
    """One container, as a process."""

    name: str
    command: list[str]
    environment: dict[str, str]
    healthcheck: list[str]
    folder: Path
    ports: dict[str, int] = field(default_factory=dict)  # in the container -> here
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log() as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait_healthy(self) -> None:
        """Until the healthcheck passes: looked at from here, which is cheap, and then as the engine does it."""
        assert self.process is not None

        def is_healthy() -> bool:
            assert self.process is not None and self.process.poll() is None, f"{self.name} ended:\n{self.said}"
            time.sleep(LOOK_EVERY_S)
            return not trouble(*self.healthcheck[2:])

        until(is_healthy, f"{self.name} to be healthy; it says:\n{self.said}", START_S)
        done = subprocess.run(self.healthcheck, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def told_to_end(self) -> None:
        """As `docker stop` does it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """The exit code."""
        assert self.process is not None
        return self.process.wait(START_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(END_S)

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def _log(self) -> IO[bytes]:
        return (self.folder / "log").open("wb")


def service(name: str, described: Mapping[str, Any], home: Path) -> Service:
    """The service `name` as compose.yaml describes it, in `home`."""
    folder = home / name
    folder.mkdir()
    ports: dict[str, int] = {}

    def here(text: str) -> str:
        text = text.replace("/opt/potluck/healthcheck.py", str(DOCKER / "healthcheck.py"))
        text = text.replace("/opt/potluck/bin", str(Path(sys.executable).parent))
        text = re.sub(r"(?<![\w.])/(data|swarm)\b", lambda m: str(folder if m[1] == "data" else home / m[1]), text)
        text = re.sub(r"--announce-host \w+", "--announce-host 127.0.0.1", text)
        return PORTS.sub(lambda match: str(ports.setdefault(match[1], bind("127.0.0.1", 0))), text)

    given = {**image_environment(), **described.get("environment", {})}
    environment = {key: here(str(text)) for key, text in given.items()}
    environment["PATH"] = environment["PATH"].replace("$PATH", os.defpath)
    # Not of the image: one thread for each, no network, and a checkout that is not installed.
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    command = described["command"]
    words = shlex.split(command) if isinstance(command, str) else command
    health = described.get("healthcheck", {}).get("test") or image_healthcheck()
    return Service(
        name, [here(word) for word in words], environment, [here(word) for word in health[1:]], folder, ports
    )


def image_healthcheck() -> list[str]:
    """What the image does where compose.yaml says nothing else; `CMD` first."""
    (line,) = (rest for name, rest in image_instructions() if name == "HEALTHCHECK")
    words: list[str] = yaml.safe_load(line[line.index("[") :])
    return ["CMD", *words]


@contextlib.contextmanager
def running(services: Mapping[str, Any], home: Path) -> Iterator[dict[str, Service]]:
    """All of them, healthy, in the order in which they depend on each other. On exit they are gone."""
    (home / "swarm").mkdir()
    found = {name: service(name, described, home) for name, described in services.items()}
    with contextlib.ExitStack() as stack:
        for one in found.values():
            stack.enter_context(nothing_left_over(one.folder))
        for one in found.values():
            stack.callback(one.kill)
        first = {name for described in services.values() for name in described.get("depends_on", ())}
        for name in sorted(found, key=lambda name: name not in first):
            found[name].start()
            if name in first:
                found[name].wait_healthy()
        for one in found.values():
            one.wait_healthy()
        yield found
