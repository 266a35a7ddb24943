"""What the end-to-end tests compare a swarm with, and what they ask of its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from client.model import SwarmModel
from dht.record import PeerRecord
from protocol.potluck_pb2 import PingRequest
from protocol.potluck_pb2_grpc import PeerStub
from slicing import load_config, model_class, resolve

PING_S = 5.0


def unsplit(folder: Path | str) -> Any:
    """The model as transformers loads it, float32."""
    source = resolve(str(folder))
    cls: Any = model_class(load_config(source))
    return cls.from_pretrained(source.location, dtype=torch.float32).eval()


def answers_at_length(model: Any) -> None:
    """Random weights would end most answers early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0


def sessions_held(model: SwarmModel) -> int:
    """Sessions on all peers of the model's swarm, as these say themselves."""

    async def held(peer: PeerRecord) -> int:
        reply = await PeerStub(model.swarm.channels.to(peer)).Ping(PingRequest(), timeout=PING_S)  # type: ignore[no-untyped-call]
        return int(reply.sessions)

    async def all_held() -> int:
        view = model.swarm.view
        return sum([await held(peer) for served in view.models for peer in view.online(served.fingerprint)])

    return model.swarm.call(all_held())
