"""Real processes on loopback: one thread on both sides, tiny models, and the peers' words where a test fails."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.slicing.architectures import make_checkpoint

SHOWN_CHARS = 4000  # of each process's standard error


def pytest_configure(config: pytest.Config) -> None:
    # hivemind finds its daemon this way whenever it starts one.
    config.addinivalue_line("filterwarnings", r"ignore:path is deprecated\. Use files\(\):DeprecationWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for process in processes.running:
            report.sections.append((f"stderr of {process.pid} {process.name}", process.stderr[-SHOWN_CHARS:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def _ended_by_a_signal_too() -> Iterator[None]:
    """SIGTERM (of a time limit, say) ends the tests as Ctrl-C does: the processes that they started end with them."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """One thread, as the laws are stated for; no progress bars of transformers (the unsplit models') in the output."""
    from transformers.utils import logging

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint("llama"): the folder of that tiny model."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            make_checkpoint(name, folder)
            made[name] = folder
        return made[name]

    return make
