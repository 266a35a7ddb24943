"""Containers, as far as they can be tried without an engine: files against linter and schema, commands as processes."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from potluck.reference import exists
from tests.containers import DOCKER, ROOT, Service, compose, image_environment, image_instructions, ours, running

KEY = "a-key-for-tests"
SECRETS = {"POTLUCK_API_KEY": KEY, "GRAFANA_PASSWORD": "a-password"}
SERVICES = compose(**SECRETS)["services"]
NOT_RUN = {
    "prometheus": "an image of its own: its configuration is read by these tests",
    "grafana": "an image of its own: tests/test_reference.py looks at its dashboard",
}
BIN = Path(sys.executable).parent
LINT_TIMEOUT_S = 60
UNIT = ROOT / "packaging" / "potluck-peer.service"
EXPOSED_AT_MOST = 2.5
"""As `systemd-analyze security` rates a unit: 10 is one without any hardening."""


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LINT_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------------- files


def test_the_dockerfile_passes_its_linter() -> None:
    run(str(BIN / "hadolint"), "--failure-threshold", "style", str(DOCKER / "Dockerfile"))


def test_the_linter_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN cd /tmp && pip install torch\n")
    done = subprocess.run([BIN / "hadolint", bad], capture_output=True, text=True, timeout=LINT_TIMEOUT_S)
    assert done.returncode == 1 and "DL3006" in done.stdout


@pytest.mark.parametrize("name", ["compose.yaml", "cuda.yaml"])
def test_compose_files_keep_to_the_published_schema(name: str) -> None:
    run(str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DOCKER / name))


def test_the_schema_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text("services:\n  peer:\n    image: potluck\n    port: 31331\n")
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LINT_TIMEOUT_S)
    assert done.returncode == 1 and "port" in done.stdout


def test_the_image_is_not_run_as_root_and_is_watched() -> None:
    said = dict(image_instructions())
    assert said["USER"].isdigit() and int(said["USER"]) > 0
    assert {"HEALTHCHECK", "CMD", "VOLUME", "WORKDIR"} <= set(said)
    assert image_environment()["POTLUCK_HOME"] == said["VOLUME"] == said["WORKDIR"] == "/data"


def test_the_image_is_made_of_files_that_exist() -> None:
    kept = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in kept:
        assert (ROOT / name).exists() or (name == "dashboard" and not exists("dashboard.cli")), name
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {name.partition("/")[0] for name in wheel["packages"]} <= set(kept)


def test_no_service_has_more_rights_than_it_needs() -> None:
    for name, service in ours(SERVICES).items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and not service.get("privileged"), name
        assert "no-new-privileges:true" in service["security_opt"], name
    for name, service in SERVICES.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to everybody"
        assert not re.search(r":latest$|^[^:]+$", service["image"]), f"{name}: a version that stays"


@pytest.mark.parametrize("missing", SECRETS)
def test_nobody_starts_it_without_secrets(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        compose(**{name: value for name, value in SECRETS.items() if name != missing})
    assert missing in (DOCKER / ".env.example").read_text()


def test_everything_mounted_exists_and_every_volume_is_declared() -> None:
    whole = compose(**SECRETS)
    for name, service in whole["services"].items():
        for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
            assert (DOCKER / source).exists() if source.startswith(".") else source in whole["volumes"], (name, source)
        assert {*service.get("depends_on", ())} <= set(whole["services"])
    override = compose("cuda.yaml")["services"]
    assert set(override) <= set(whole["services"])


def targets() -> dict[str, list[tuple[str, str]]]:
    """Who is scraped: service and port, by job."""
    found = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    return {
        job["job_name"]: [tuple(t.split(":")) for config in job["static_configs"] for t in config["targets"]]
        for job in found
    }


def test_prometheus_scrapes_every_service_that_has_metrics() -> None:
    scraped = {name for job in targets().values() for name, _ in job}
    assert scraped == set(ours(SERVICES)) - {"bootstrap"}, "a bootstrap node has no metrics"
    secret = re.findall(r"/run/secrets/(\S+)", (DOCKER / "prometheus.yml").read_text())
    assert secret == SERVICES["prometheus"]["secrets"]


# ---------------------------------------------------------------------- the unit


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that exists here."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here to ask")
    path = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert text.count("ExecStart=/opt/potluck/bin/python ") == 1
    path.write_text(text.replace("/opt/potluck/bin/python", sys.executable))
    return path


def test_systemd_understands_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=perhaps"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert "perhaps" in done.stderr


def test_the_unit_is_hardened(unit: Path) -> None:
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", str(unit))
    match = re.search(r"exposure level for \S+: ([\d.]+)", said)
    assert match is not None and float(match[1]) <= EXPOSED_AT_MOST


# ---------------------------------------------------------------------- the healthcheck


class _Door(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()
        self.wfile.write(b"all is well")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def door() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Door) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_healthcheck_tells_well_from_ill(door: int) -> None:
    def code(*arguments: str) -> int:
        return subprocess.run([sys.executable, DOCKER / "healthcheck.py", *arguments], capture_output=True).returncode

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        shut = closed.getsockname()[1]
        assert code(f"http://127.0.0.1:{door}/health") == code(f"127.0.0.1:{door}") == 0
        assert code(f"http://127.0.0.1:{door}/health", "is well") == 0
        assert code(f"http://127.0.0.1:{door}/health", "is ill") == 1
        assert code(f"http://127.0.0.1:{door}/elsewhere") == code(f"127.0.0.1:{shut}") == 1


# ---------------------------------------------------------------------- the commands


def on_this_branch(name: str) -> bool:
    """Has this checkout what the service starts?"""
    return {"api": exists("client.api.server"), "dashboard": exists("dashboard.cli")}.get(name, True)


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Service]]:
    """All services that are ours, healthy."""
    services = ours(SERVICES)
    assert set(SERVICES) - set(services) == set(NOT_RUN)
    with running(
        {name: it for name, it in services.items() if on_this_branch(name)}, tmp_path_factory.mktemp("containers")
    ) as found:
        yield found


def answer(url: str, body: object = None) -> str:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, headers), timeout=60) as reply:
        text: str = reply.read().decode()
    return text


def test_every_target_of_prometheus_answers_with_metrics(containers: dict[str, Service]) -> None:
    scraped = [target for job in targets().values() for target in job if target[0] in containers]
    for name, port in scraped:
        text = answer(f"http://127.0.0.1:{containers[name].ports[port]}/metrics")
        assert any(family.samples for family in text_string_to_metric_families(text)), name
    assert len(scraped) >= 3


@pytest.mark.skipif(not on_this_branch("api"), reason="this checkout has no API")
def test_the_swarm_of_containers_answers(containers: dict[str, Service]) -> None:
    url = f"http://127.0.0.1:{containers['api'].ports['8000']}/v1/chat/completions"
    said = json.loads(
        answer(url, {"model": "potluck-demo", "messages": [{"role": "user", "content": "What is 12 + 30?"}]})
    )
    assert said["choices"][0]["message"]["content"].strip() == "42"


@pytest.mark.skipif(not on_this_branch("api"), reason="this checkout has no API")
def test_the_example_with_openai_answers(containers: dict[str, Service], capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "users.md").read_text()
    (text,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "from openai" in block)
    text = text.replace(":8000/", f":{containers['api'].ports['8000']}/").replace('"none"', repr(KEY))
    exec(compile(text, "docs/users.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "42"


def test_all_end_when_told_to(containers: dict[str, Service]) -> None:
    """Runs last in this module: as `docker compose stop`, the bootstrap node after those that depend on it."""
    first = containers["bootstrap"]
    others = [service for service in containers.values() if service is not first]
    for stage in (others, [first]):
        for service in stage:
            service.told_to_end()
        for service in stage:
            assert service.ended() == 0, service.said
