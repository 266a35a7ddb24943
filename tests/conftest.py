"""The order of tests: long modules first, so that of two workers neither has a long one left when the other is done."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent
LONG = ("e2e", "fuzz", "demo", "slicing/test_architectures.py", "sim", "dht", "slicing", "peer", "client")
"""Longest first: folders, or modules of those that come later. All others take moments."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.path.relative_to(ROOT)))  # stable: the order within a module stays


def _rank(module: Path) -> int:
    return next((i for i, long in enumerate(LONG) if module.is_relative_to(long)), len(LONG))
