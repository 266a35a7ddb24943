"""`python -m client api` as a process over peers that are killed: the official client and the `llm` tool against it."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.processes import PeerProcess, Process, at_home, environment, nothing_left_over, until

SEED = int(os.environ.get("SOAK_SEED", secrets.randbits(32)))
CLIENTS = 16
PAUSE_S = 0.5  # between two questions of a client, at most
SPANS = ("0:12", "12:24")
ANSWERS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is 12 + 30?": "42",
}


@dataclass(eq=False)
class Service:
    """The API process, and the swarm behind it."""

    home: Path
    api: Process
    url: str
    maddr: str
    peers: list[PeerProcess]

    def start(self, span: str) -> PeerProcess:
        """Another peer; does not wait for it."""
        peer = PeerProcess(self.home, "--blocks", span, "--join", self.maddr)
        self.peers.append(peer)
        return peer

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="a key", **settings)

    def health(self) -> httpx2.Response:
        return httpx2.get(f"{self.url}/health", timeout=20.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    with at_home(home), nothing_left_over(home), Process(home, "dht", "bootstrap", "--host", "127.0.0.1") as node:
        maddr = node.says(r"^(?:join )?(/\S+/p2p/\S+)")[1]
        arguments = ("--model", "potluck-demo", "--join", maddr, "--port", "0", "--api-key", "a key")
        with Process(home, "client", "api", *arguments) as api:
            found = Service(home, api, "", maddr, [])
            try:
                found.url = api.says(r"^api of potluck-demo at (http://\S+)/v1$")[1]
                yield found
            finally:
                for peer in found.peers:
                    peer.kill()


def test_it_is_healthy_once_all_blocks_have_a_peer(service: Service) -> None:
    assert service.health().status_code == 503
    first = service.start(SPANS[0])
    first.ready()
    until(lambda: service.health().json()["missing"] == ["12:24"], "the first peer to be seen")
    service.start(SPANS[1]).ready()
    until(lambda: service.health().status_code == 200, "the swarm to be whole")


def test_the_official_client(service: Service) -> None:
    client = service.client()
    for question, answer in ANSWERS.items():
        messages: Any = [{"role": "user", "content": question}]
        found = client.chat.completions.create(model="potluck-demo", messages=messages)
        assert found.choices[0].message.content == answer
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="another").models.list()


def test_the_llm_tool(service: Service, tmp_path: Path) -> None:
    names = {"potluck": "potluck-demo", "another": "gpt-5"}
    models = [
        {"model_id": model, "model_name": name, "api_base": f"{service.url}/v1", "api_key_name": "potluck"}
        for model, name in names.items()
    ]
    tmp_path.joinpath("extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML, too
    tmp_path.joinpath("keys.json").write_text(json.dumps({"potluck": "a key"}))

    def llm(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env=environment(service.home) | {"LLM_USER_PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    question, answer = next(iter(ANSWERS.items()))
    for more in ((), ("--no-stream",)):
        done = llm("-m", "potluck", *more, question)
        assert (done.returncode, done.stdout.strip()) == (0, answer), done.stderr
    done = llm("-m", "another", question)
    assert done.returncode != 0
    assert "'gpt-5' is not served here" in done.stderr


@pytest.mark.parametrize("seconds", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_no_request_fails_while_peers_are_killed(service: Service, seconds: int) -> None:
    """Sixteen clients. Before a peer is killed, there is another one with its blocks."""
    print(f"seed {SEED}")
    for span in SPANS:
        if not any(peer.is_alive and peer.blocks == span for peer in service.peers):  # this test may be run alone
            service.start(span).ready()
    until(lambda: service.health().status_code == 200, "the swarm to be whole")
    rng, end_s = random.Random(SEED), time.monotonic() + seconds
    happened: Counter[str] = Counter()

    def use(number: int) -> list[str]:
        client, own, trouble = service.client(max_retries=0, timeout=60.0), random.Random(SEED + number), []
        with client:
            while time.monotonic() < end_s:
                question, answer = own.choice(list(ANSWERS.items()))
                messages: Any = [{"role": "user", "content": question}]
                try:
                    if own.random() < 0.5:
                        chunks = client.chat.completions.create(model="potluck-demo", messages=messages, stream=True)
                        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                    else:
                        whole = client.chat.completions.create(model="potluck-demo", messages=messages)
                        text = whole.choices[0].message.content or ""
                except openai.OpenAIError as error:
                    trouble.append(repr(error))
                else:
                    happened["answered"] += 1
                    if text != answer:
                        trouble.append(f"{question} {text!r}")
                time.sleep(own.uniform(0, PAUSE_S))
        return trouble

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(use, number) for number in range(CLIENTS)]
        while time.monotonic() < end_s - 5.0:
            span = rng.choice(SPANS)
            service.start(span).ready()
            old = next(peer for peer in service.peers if peer.is_alive and peer.blocks == span)
            old.kill()
            happened["killed"] += 1
        assert [trouble for client in clients for trouble in client.result(90)] == []
    print(dict(happened))
    assert happened["killed"] >= 1
    assert happened["answered"] >= seconds


def test_it_ends_when_it_is_told_to(service: Service) -> None:
    service.api.send(signal.SIGTERM)
    assert service.api.wait(20.0) == 0
