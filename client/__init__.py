"""Use the swarm: a Hugging Face model whose blocks are remote. Knows nothing about serving.

    from client import SwarmModelForCausalLM

    with SwarmModelForCausalLM.from_pretrained("potluck-demo") as model:
        ids = tokenizer("...", return_tensors="pt").input_ids
        model.generate(ids, max_new_tokens=32)

Names are imported on first use: `python -m client --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.config import ClientConfig
    from client.conversation import GenerationSession
    from client.model import SwarmModel, SwarmModelForCausalLM
    from client.swarm import Swarm

__all__ = ["ClientConfig", "GenerationSession", "Swarm", "SwarmModel", "SwarmModelForCausalLM"]

_HOME = {
    "ClientConfig": "client.config",
    "GenerationSession": "client.conversation",
    "Swarm": "client.swarm",
    "SwarmModel": "client.model",
    "SwarmModelForCausalLM": "client.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
