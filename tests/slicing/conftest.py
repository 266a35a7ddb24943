"""Tiny models on disk, made once per test run, the unsplit models to compare with, and what is read of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slicing import ModelSource, load_config, model_class, resolve
from slicing.checkpoint import StoredTensor, read_tensor
from tests.models import _one_quiet_thread, checkpoint  # noqa: F401  # fixtures


@pytest.fixture(scope="session")
def source(checkpoint: Callable[[str], Path]) -> Callable[[str], ModelSource]:  # noqa: F811  # its fixture
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


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[StoredTensor]:
    """The tensors that were read from files so far."""
    found: list[StoredTensor] = []

    def noting(path: Path, stored: StoredTensor) -> torch.Tensor:
        found.append(stored)
        return read_tensor(path, stored)

    monkeypatch.setattr("slicing.loading.read_tensor", noting)
    return found
