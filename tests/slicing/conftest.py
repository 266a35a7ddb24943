"""Tiny models on disk, made once per test run, and the unsplit models to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slicing import ModelSource, load_config, model_class, resolve
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
            folder = tmp_path_factory.mktemp(name)
            make_checkpoint(name, folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session")
def source(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelSource]:
    """source("llama"): the same as a ModelSource."""
    return lambda name: resolve(str(checkpoint(name)))


@pytest.fixture(scope="session")
def unsplit(source: Callable[[str], ModelSource]) -> Callable[[str], Any]:
    """unsplit("llama"): the model as transformers loads it."""

    def load(name: str) -> Any:
        config = load_config(source(name))
        cls: Any = model_class(config)
        return cls.from_pretrained(source(name).location, config=config, dtype=torch.float32).eval()

    return load
