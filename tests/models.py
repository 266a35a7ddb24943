"""Fixtures of the tests that run the tiny models of `tests.slicing.architectures`; conftests import them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.slicing.architectures import make_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    """One thread, as the laws are stated for; no progress bars of transformers (the unsplit models') in the output."""
    from transformers.utils import logging

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint("llama"): the folder of that tiny model. Read-only; copy it to damage it."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("models") / name
            make_checkpoint(name, folder)
            made[name] = folder
        return made[name]

    return make
