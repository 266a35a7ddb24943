"""`python -m demo` as a newcomer runs it: it ends well, or is interrupted, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

DEMO_TIMEOUT_S = 120
INTERRUPTED_TIMEOUT_S = 40


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The demo, with its temporary files in `folder`. Whatever is left of it in the end is killed."""
    environ = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "demo", *arguments]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for left in processes_of(folder):
                left.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose home is in `folder`: p2pd inherits the environment too. A zombie has ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("POTLUCK_HOME", "")
            if home.startswith(str(folder)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def said_until(process: subprocess.Popen[str], mark: str) -> str:
    """What the demo says up to the line that contains `mark`."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if mark in line:
            return said
    pytest.fail(f"the demo ended without saying {mark!r}:\n{said}")


def assert_nothing_left(folder: Path) -> None:
    assert [process.cmdline() for process in processes_of(folder)] == []
    assert [path.name for path in folder.glob("potluck-demo-*")] == []


def test_it_answers_loses_a_peer_and_answers_the_same(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        said, _ = process.communicate(timeout=DEMO_TIMEOUT_S)
        assert process.returncode == 0, said
        for span in ("0:9", "9:15", "15:24"):
            assert f" {span} " in said
        assert "model: Paris\n" in said
        assert said.count("model: anchor, guitar, meadow, tower\n") == 1
        assert "model: anchor, guit[kill -9 " in said
        assert "]ar, meadow, tower\n" in said
        assert " is lost " in said and "the chain is now " in said
        assert "the same 30 tokens as undisturbed" in said
        assert " killed" in said
        assert_nothing_left(tmp_path)


@pytest.mark.parametrize("mark", ["2. Three peers", "4. A spare volunteer"])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, mark: str) -> None:
    with demo(tmp_path) as process:
        said_until(process, mark)
        assert processes_of(tmp_path)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=INTERRUPTED_TIMEOUT_S)
        assert process.returncode == 130, said
        assert "Stopped; nothing stays behind." in said
        assert_nothing_left(tmp_path)


def test_a_demo_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        said_until(process, "2. Three peers")
        process.kill()
        until_s = time.monotonic() + INTERRUPTED_TIMEOUT_S
        while time.monotonic() < until_s and (processes_of(tmp_path) or list(tmp_path.glob("potluck-demo-*"))):
            time.sleep(0.1)
        assert_nothing_left(tmp_path)


def test_a_peer_that_cannot_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 24}')
    with demo(tmp_path, "--model", str(tmp_path / "model")) as process:
        said, _ = process.communicate(timeout=DEMO_TIMEOUT_S)
        assert process.returncode == 1, said
        assert "The demo failed: the peer of blocks " in said and "its last words: Error: " in said
        assert_nothing_left(tmp_path)


def test_keep_leaves_the_swarm_until_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path, "--keep") as process:
        said = said_until(process, "Ctrl-C ends it.")
        status = next(line.split(":", 1)[1].strip() for line in said.splitlines() if "who serves what" in line)
        shown = subprocess.run(status, shell=True, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown
        assert "all 24 blocks are served" in shown.stdout
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=INTERRUPTED_TIMEOUT_S)
        assert process.returncode == 0, said
        assert_nothing_left(tmp_path)
