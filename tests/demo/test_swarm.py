"""`python -m demo` as a newcomer runs it: it ends well, or is interrupted, and nothing of it stays behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.processes import Process, until

DEMO_TIMEOUT_S = 120
INTERRUPTED_TIMEOUT_S = 40


@contextmanager
def demo(folder: Path, *arguments: str, anew: bool = False) -> Iterator[Process]:
    """The demo, with its temporary files in `folder`; the processes that it starts are new ones in any case. Whatever
    is left of it in the end is killed. `anew`: see `Process`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        process = Process(folder, "demo", *arguments, anew=anew)
    with process:
        try:
            yield process
        finally:
            process.kill()
            for left in processes_of(folder):
                left.kill()


def homes(folder: Path) -> list[Path]:
    """The demo's own temporary folders."""
    return [*folder.glob("potluck-demo-*")]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose home is one of the demo's: p2pd inherits the environment too. A zombie has ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("POTLUCK_HOME", "")
            if home.startswith(str(folder / "potluck-demo-")) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def said_by(process: Process, code: int, timeout_s: float) -> str:
    """What the demo has said when it has ended, as it must, with `code`."""
    ended = process.wait(timeout_s)
    said = process.stdout + process.stderr
    assert ended == code, said
    return said


def assert_nothing_left(folder: Path) -> None:
    assert [process.cmdline() for process in processes_of(folder)] == []
    assert [path.name for path in homes(folder)] == []


def test_it_answers_loses_a_peer_and_answers_the_same(tmp_path: Path) -> None:
    with demo(tmp_path, anew=True) as process:
        said = said_by(process, 0, DEMO_TIMEOUT_S)
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


@pytest.mark.parametrize(
    ("mark", "anew"), [("2. Three peers", True), pytest.param("4. A spare volunteer", False, marks=pytest.mark.slow)]
)
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, mark: str, anew: bool) -> None:
    with demo(tmp_path, anew=anew) as process:
        process.says(mark, DEMO_TIMEOUT_S)
        assert processes_of(tmp_path)
        process.send(signal.SIGINT)
        assert "Stopped; nothing stays behind." in said_by(process, 130, INTERRUPTED_TIMEOUT_S)
        assert_nothing_left(tmp_path)


def test_a_demo_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        process.says("2. Three peers", DEMO_TIMEOUT_S)
        assert processes_of(tmp_path) and homes(tmp_path)
        process.kill()
        until(lambda: not (processes_of(tmp_path) or homes(tmp_path)), "the demo's rest to go", INTERRUPTED_TIMEOUT_S)


@pytest.mark.slow
def test_a_peer_that_cannot_start_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 24}')
    with demo(tmp_path, "--model", str(tmp_path / "model")) as process:
        said = said_by(process, 1, DEMO_TIMEOUT_S)
        assert "The demo failed: the peer of blocks " in said and "its last words: Error: " in said
        assert_nothing_left(tmp_path)


@pytest.mark.slow
def test_keep_leaves_the_swarm_until_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path, "--keep") as process:
        process.says(r"Ctrl-C ends it\.", DEMO_TIMEOUT_S)
        lines = process.stdout.splitlines()
        status = next(line.split(":", 1)[1].strip() for line in lines if "who serves what" in line)
        shown = subprocess.run(status, shell=True, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0, shown
        assert "all 24 blocks are served" in shown.stdout
        process.send(signal.SIGINT)
        said_by(process, 0, INTERRUPTED_TIMEOUT_S)
        assert_nothing_left(tmp_path)
