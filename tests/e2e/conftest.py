"""Real processes on loopback: one thread on both sides, tiny models, and the peers' words where a test fails."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import pytest

from tests import processes
from tests.models import _one_quiet_thread, checkpoint  # noqa: F401  # fixtures

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
