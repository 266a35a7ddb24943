"""`python -m dashboard` over a real peer: it sees the peer die within seconds, keeps no addresses, and ends."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from dashboard.cli import serve
from tests.processes import PeerProcess, Process, nothing_left_over, until

SOON_S = 5.0
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")


def test_a_peer_that_is_killed_is_seen(tmp_path: Path) -> None:
    names = ("--public-name", "attic", "--contact", "zoe@example.org")
    with contextlib.ExitStack() as stack:
        stack.enter_context(nothing_left_over(tmp_path))
        peer = PeerProcess(tmp_path, "--blocks", "0:2", *names)
        stack.enter_context(peer)
        peer.ready()
        page = stack.enter_context(Process(tmp_path, "dashboard", "--port", "0", "--join", peer.maddr))
        url = page.says(r"^health page (\S+)$")[1]

        def seen() -> dict[str, Any]:
            models = httpx2.get(f"{url}api/v1/swarm", trust_env=False).json()["models"]
            return models[0]["peers"][0] if models else {}

        until(lambda: seen().get("answers"), "the peer")
        claims = seen()["claims"]
        assert (claims["public_name"], claims["contact"]) == ("attic", "zoe@example.org")
        assert claims["tokens_served"] == 0
        peer.kill()
        killed_s = time.monotonic()
        until(lambda: seen()["standing"] == "silent", "the loss", SOON_S)
        assert time.monotonic() - killed_s < SOON_S
        page.send(signal.SIGTERM)
        assert page.wait() == 0
        assert not ADDRESS.search(page.stdout.replace(url, "")), "where the page is, and nothing else"
        assert "GET" not in page.stderr, "who reads it is not noted"
        assert "Traceback" not in page.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--port", "70000"), "not a TCP port"),
        (("--join", "somewhere"), "is not the address of a swarm's node"),
        (("--probe-peers", "0"), "must be positive"),
    ],
)
def test_mistakes_are_one_sentence(options: tuple[str, ...], sentence: str) -> None:
    ended = CliRunner().invoke(serve, options)
    assert ended.exit_code == 2
    assert sentence in ended.stderr
