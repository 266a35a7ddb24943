"""Potluck as a new user meets it: the commands of the README, what they answer, a user's mistakes, how they end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.processes import (
    LOOPBACK,
    START_S,
    Ended,
    LocalSwarm,
    PeerProcess,
    Process,
    environment,
    nothing_left_over,
    run,
    swarm,
    until,
)
from tests.slicing.architectures import N_BLOCKS

CODE_AFTER_SECOND_SIGNAL = 128 + signal.SIGTERM


# ---------------------------------------------------------------------- three terminals, and a fourth that asks


@dataclass(frozen=True)
class Terminals:
    """A swarm of the embedded model, started as the README says."""

    swarm: LocalSwarm
    status_of_one: Ended  # while there was the first peer only

    def run(self, *arguments: str, stdin: str | None = None) -> Ended:
        return run(self.swarm.home, *arguments, stdin=stdin)


@pytest.fixture(scope="module", name="terminals")
def _terminals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminals]:
    home = tmp_path_factory.mktemp("home")
    with swarm(home, None, ["10:20"], anew=True) as peers:
        status = run(home, "client", "status", "--json")
        for peer in [peers.start("0:10", anew=False), peers.start("20:24", anew=False)]:
            peer.ready()
        yield Terminals(peers, status)


def test_bare_words_start_a_swarm_of_the_embedded_model(terminals: Terminals) -> None:
    first = terminals.swarm.peers[0]
    assert (first.blocks, first.model) == ("10:20", "potluck-demo")
    assert "started a new swarm" in first.stderr
    assert f"Others join with:  python -m peer serve --join {first.maddr}" in first.stderr


def test_status_says_what_is_missing(terminals: Terminals) -> None:
    assert terminals.status_of_one.code == 1
    (model,) = json.loads(terminals.status_of_one.stdout)["models"]
    assert (model["name"], model["n_blocks"], model["missing"]) == ("potluck-demo", 24, ["0:10", "20:24"])


def test_status_of_a_whole_swarm(terminals: Terminals) -> None:
    ended = terminals.run("client", "status", "--json")
    assert ended.code == 0, ended.stderr
    (model,) = json.loads(ended.stdout)["models"]
    assert model["missing"] == []
    assert model["replicas"] == [1] * 24
    expected = {(peer.peer_id, peer.blocks, "online") for peer in terminals.swarm.peers}
    assert {(peer["peer_id"], peer["blocks"], peer["state"]) for peer in model["peers"]} == expected
    assert ended.stderr == ""


def test_status_for_people(terminals: Terminals) -> None:
    ended = terminals.run("client", "status")
    assert ended.code == 0, ended.stderr
    assert "all 24 blocks are served" in ended.stdout
    assert all(blocks in ended.stdout for blocks in ("0:10", "10:20", "20:24"))


def test_generate_finds_the_swarm_and_answers_rightly(terminals: Terminals, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    options = ("--stats", "--trace", "--trace-file", str(file))
    ended = terminals.run("client", "generate", "What is the capital of France?", *options)
    assert (ended.code, ended.stdout) == (0, "Paris\n"), ended.stderr
    *table, stats = ended.stderr.splitlines()
    assert all(peer.peer_id[-8:] in stats for peer in terminals.swarm.peers), "--stats names the chain"
    rows = [row.split()[1] for row in table if re.match(r"\S+ +\d+:\d+ ", row)]
    assert rows == ["0:10", "10:20", "20:24"], "--trace shows it"
    (trace,) = map(json.loads, file.read_text().splitlines())
    assert {hop["peer_id"] for hop in trace["hops"]} == {peer.peer_id for peer in terminals.swarm.peers}
    spent_ms = sum(hop["queue_ms"] + hop["compute_ms"] + hop["network_ms"] for hop in trace["hops"])
    assert 0 < spent_ms <= 1e3 * trace["total_s"]


def test_generate_reads_the_question_from_stdin(terminals: Terminals) -> None:
    ended = terminals.run("client", "generate", "-", stdin="What is 27 + 58?\n")
    assert (ended.code, ended.stdout) == (0, "85\n"), ended.stderr
    assert ended.stderr == ""


def test_chat_through_pipes(terminals: Terminals) -> None:
    turns = "What is the capital of Norway?\nWhat is 30 + 12?\n/new\nWhat is the opposite of hot?\n/exit\n"
    ended = terminals.run("client", "chat", stdin=turns)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.split() == ["Oslo", "42", "cold"]


# ---------------------------------------------------------------------- a model that never stops talking


@dataclass(frozen=True)
class Talker:
    """A swarm of a model whose answers have no end."""

    swarm: LocalSwarm
    model: str

    def chat(self) -> Process:
        return Process(
            self.swarm.home, "client", "chat", "--model", self.model, "--max-new-tokens", "5000",
            has_input=True,
        )  # fmt: skip

    def status(self) -> set[str]:
        """The ids of the peers that a new client sees."""
        ended = run(self.swarm.home, "client", "status", "--json")
        models = json.loads(ended.stdout)["models"]
        return {peer["peer_id"] for model in models for peer in model["peers"]}


def make_talker(folder: Path) -> None:
    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=N_BLOCKS, num_attention_heads=4,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(200)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=core, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module", name="talker")
def _talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talker]:
    folder, home = tmp_path_factory.mktemp("models") / "talker", tmp_path_factory.mktemp("home")
    make_talker(folder)
    # The first stays; each of the others is for one test to end.
    with swarm(home, folder, [f"0:{N_BLOCKS}"] * 4) as peers:
        yield Talker(peers, str(folder))


def test_ctrl_c_stops_the_answer_and_not_the_program(talker: Talker) -> None:
    with talker.chat() as chat:
        chat.says("Ctrl-C stops an answer", on_stderr=True)
        chat.press_ctrl_c()  # nothing is being said: no reason to leave
        chat.says("/exit or Ctrl-D leaves", on_stderr=True)
        for turn in range(2):
            chat.write("w5 w6 w7\n")
            chat.says(rf"\A(.*\n){{{turn}}}w\d+ w\d+ w\d+")
            chat.press_ctrl_c()
            chat.says(rf"\A(.*\n){{{turn + 1}}}")
        chat.end_input()  # Ctrl-D
        assert chat.wait() == 0
        answers = chat.stdout.splitlines()
        assert len(answers) == 2
        assert all(3 <= len(answer.split()) < 4000 for answer in answers)
        assert "Traceback" not in chat.stderr


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_a_peer_properly(talker: Talker, how: str) -> None:
    peer = talker.swarm.living[-1]
    assert peer is not talker.swarm.peers[0]
    daemons = psutil.Process(peer.pid).children(recursive=True)
    assert any("p2pd" in daemon.name() for daemon in daemons)
    if how == "Ctrl-C":
        peer.press_ctrl_c()
    else:
        peer.send(signal.SIGTERM)
    assert peer.wait() == 0, peer.stderr
    assert not any(daemon.is_running() for daemon in daemons), "p2pd was left running"
    assert talker.status() == {peer.peer_id for peer in talker.swarm.living}, "the swarm was not told"
    assert "leaving the swarm" in peer.stderr and "Traceback" not in peer.stderr


def test_a_second_signal_ends_it_at_once(talker: Talker) -> None:
    peer = talker.swarm.living[-1]
    assert peer is not talker.swarm.peers[0]
    daemons = psutil.Process(peer.pid).children(recursive=True)
    peer.send(signal.SIGTERM)
    peer.says("once more to leave at once", on_stderr=True)
    peer.send(signal.SIGTERM)
    assert peer.wait() == CODE_AFTER_SECOND_SIGNAL
    until(lambda: not any(daemon.is_running() for daemon in daemons), "p2pd to end")


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    with nothing_left_over(tmp_path), PeerProcess(tmp_path, "--blocks", "0:24") as peer:
        peer.says("started a new swarm", on_stderr=True)
        peer.press_ctrl_c()
        assert peer.wait() == 0
        assert "Traceback" not in peer.stderr


# ---------------------------------------------------------------------- a user's mistakes

SERVE = ("peer", "serve", *LOOPBACK)
NOBODY = "/ip4/127.0.0.1/tcp/{closed}/p2p/QmSvv1GtRbSg95xi3aMFKiP4N3Y6LSMRQUNpdRHbFfmkBa"

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "blocks that are none": ((*SERVE, "--blocks", "ten to twenty"), "ten to twenty"),
    "blocks backwards": ((*SERVE, "--blocks", "20:10"), "20:10"),
    "blocks beyond the model": ((*SERVE, "--blocks", "20:30"), "24"),
    "blocks and a number of them": ((*SERVE, "--blocks", "0:3", "--num-blocks", "3"), "give one of them"),
    "no such folder": ((*SERVE, "--model", "./nowhere"), "nowhere"),
    "no such model on the hub": ((*SERVE, "--model", "nobody/nothing"), "nobody/nothing"),
    "port in use": ((*SERVE, "--port", "{used}"), "{used}"),
    "DHT port in use": ((*SERVE, "--dht-port", "{used}"), "{used}"),
    "an address that is none": ((*SERVE, "--join", "example.org"), "example.org"),
    "an address where nobody is": ((*SERVE, "--join", NOBODY), "no node of the swarm answers"),
    "a client's address that is none": (("client", "status", "--join", "example.org"), "example.org"),
    "a client's address where nobody is": (("client", "status", "--join", NOBODY), "no node of the swarm answers"),
    "no swarm to ask": (("client", "generate", "Hello"), "no swarm was found"),
    "nothing to ask": (("client", "generate", ""), "empty"),
    "unknown codec": (("client", "generate", "--codec", "zip", "Hello"), "zip"),
    "nobody to trust": (("client", "generate", "--trusted-only", "Who?"), "name those you trust with --trust PEER"),
    "unknown quantisation": ((*SERVE, "--quantization", "int3"), "int8"),
}
SLOW = {"blocks beyond the model", "no such model on the hub"}
"""All others are told before anything is imported that takes seconds."""
HEAVY = {"torch", "transformers", "hivemind", "huggingface_hub"}


def run_quickly(home: Path, *arguments: str) -> Ended:
    """As `run`, and nothing heavy is imported."""
    command = [sys.executable, "-X", "importtime", "-m", *arguments]
    done = subprocess.run(command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=START_S)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "protocol.errors" in imported, done.stderr
    assert not imported & HEAVY
    said = [line for line in lines if not line.startswith("import time:")]
    return Ended(done.returncode, done.stdout, "\n".join(said))


def check_mistake(ended: Ended, said: str) -> None:
    """Exit code 2 and one sentence; what was found out before may stand above it."""
    assert ended.code == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line and not line.startswith("· ")]
    if lines[0].startswith("Usage: "):
        lines = lines[2:]  # click shows how it is used, and where the help is
    assert len(lines) == 1, lines
    assert re.match(r"Error: .+", lines[0])
    assert said in lines[0]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(mistake: str, tmp_path: Path) -> None:
    arguments, said = MISTAKES[mistake]
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        closed = gone.getsockname()[1]
    with closing(socket.create_server(("127.0.0.1", 0))) as used, nothing_left_over(tmp_path):
        ports = {"used": used.getsockname()[1], "closed": closed}
        ended = (run if mistake in SLOW else run_quickly)(tmp_path, *(word.format(**ports) for word in arguments))
    check_mistake(ended, said.format(**ports))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[peer]\nblocs = "0:3"', "'blocs'"),
        ("[peer]\nport = 'many'", "'many'"),
        ("[peer\n", "config.toml"),
        ("peer = 3", "[peer] must be a table"),
    ],
)
def test_a_wrong_configuration_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    with nothing_left_over(tmp_path):
        check_mistake(run_quickly(tmp_path, *SERVE), said)
