"""A draft model that cannot be used is a user's mistake, told in one sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from transformers import LlamaConfig

from client.drafters import load_draft
from client.model import SwarmModel
from protocol.errors import ConfigError


@pytest.mark.parametrize(("vocabulary", "message"), [(97, "cannot be loaded"), (98, "same tokenizer")])
def test_a_draft_model_that_cannot_be_used(vocabulary: int, message: str, tmp_path: Path) -> None:
    """Its weights are missing; or its tokens are not the model's."""
    LlamaConfig(vocab_size=97, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    served = SimpleNamespace(
        config=LlamaConfig(vocab_size=vocabulary), source=SimpleNamespace(name="served"), device="cpu"
    )
    with pytest.raises(ConfigError, match=message):
        load_draft(str(tmp_path), cast(SwarmModel, served))
