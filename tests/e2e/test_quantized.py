"""Peers that keep their weights in few bits answer, one of each kind in a chain."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import run, swarm


def test_peers_with_quantised_weights_answer_and_say_what_they_are(tmp_path: Path) -> None:
    with swarm(tmp_path, None, ["0:12"], "--quantization", "int8") as peers:
        peers.start("12:24", "--quantization", "nf4").ready()
        ended = run(tmp_path, "client", "generate", "What is the capital of France?")
        assert (ended.code, ended.stdout) == (0, "Paris\n"), ended.stderr
        ended = run(tmp_path, "client", "status", "--json")
        (model,) = json.loads(ended.stdout)["models"]
        assert {(peer["blocks"], peer["quantization"]) for peer in model["peers"]} == {
            ("0:12", "int8"),
            ("12:24", "nf4"),
        }
