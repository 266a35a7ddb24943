"""As the end-to-end tests: one quiet thread, SIGTERM ends what was started, and the peers' words where a test fails."""

from __future__ import annotations

from tests.e2e.conftest import (  # noqa: F401  # fixtures and hooks
    _ended_by_a_signal_too,
    _one_quiet_thread,
    checkpoint,
    pytest_configure,
    pytest_runtest_makereport,
)
