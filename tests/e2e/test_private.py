"""A private swarm of real processes: with its token one is answered; without it, or with another, one is told why."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.join_token import JoinToken
from tests.processes import PeerProcess, Process, nothing_left_over, run

pytestmark = pytest.mark.slow

QUESTION = ("client", "generate", "What is the capital of France?", "--wait-s", "1")


def test_members_are_answered_and_strangers_told_why(tmp_path: Path) -> None:
    home, token = tmp_path / "home", tmp_path / "token"
    home.mkdir()
    made = run(home, "peer", "join-token")
    token.write_text(made.stdout)
    with (
        nothing_left_over(home),
        Process(home, "dht", "bootstrap", "--host", "127.0.0.1", "--join-token", str(token)) as bootstrap,
    ):
        maddr = bootstrap.says(r"^(/ip4/\S+)$")[1]
        with PeerProcess(home, "--join", maddr, "--join-token", str(token)) as peer:
            peer.ready()
            member = run(home, *QUESTION, "--join-token", str(token))
            assert (member.code, member.stdout) == (0, "Paris\n"), member.stderr
            for options in ((), ("--join-token", JoinToken.new().text)):
                stranger = run(home, *QUESTION, "--join", maddr, *options)
                assert stranger.code in (1, 2) and stranger.stdout == ""
                assert "if the swarm is private, give its join token (--join-token)" in stranger.stderr
                assert run(home, "client", "status", "--join", maddr, "--json", *options).stdout.count("peer_id") == 0
            assert token.read_text().strip() not in peer.stdout + peer.stderr + bootstrap.stderr
            with PeerProcess(home, "--join", maddr, "--model", "potluck-demo", "--blocks", "0:2") as outside:
                outside.says("the nodes of this swarm refuse what this peer says", on_stderr=True)
                seen = run(home, "client", "status", "--json", "--join-token", str(token)).stdout
                assert seen.count("peer_id") == 1


def test_a_token_with_a_mistake_is_told_at_once(tmp_path: Path) -> None:
    wrong = JoinToken.new().text[:-1]
    for command in (("peer", "serve"), ("client", "status"), ("dht", "bootstrap"), ("dashboard",)):
        ended = run(tmp_path, *command, "--join-token", wrong)
        assert ended.code == 2 and ended.stdout == "" and "the join token has a mistake" in ended.stderr
        assert wrong not in ended.stderr
