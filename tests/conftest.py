"""The order of tests: long modules first, so that of two workers neither has a long one left when the other is done.

And tiny models that more than one folder of tests needs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_llama

ROOT = Path(__file__).parent
LONG = ("e2e", "fuzz", "demo", "slicing/test_architectures.py", "sim", "dht", "slicing", "peer", "client")
"""Longest first: folders, or modules of those that come later. All others take moments."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.path.relative_to(ROOT)))  # stable: the order within a module stays


def _rank(module: Path) -> int:
    return next((i for i, long in enumerate(LONG) if module.is_relative_to(long)), len(LONG))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """tiny_llama(4): the folder of a tiny llama of so many blocks. Read-only; it is made once."""
    made: dict[int, Path] = {}

    def make(n_blocks: int) -> Path:
        if n_blocks not in made:
            made[n_blocks] = tmp_path_factory.mktemp(f"llama-{n_blocks}-")
            write_llama(made[n_blocks], n_blocks)
        return made[n_blocks]

    return make
