"""What the end-to-end tests compare a swarm with, and what they ask of its peers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import torch

from client.model import SwarmModel
from client.swarm import Swarm
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


def sessions_by_peer(swarm: Swarm) -> dict[str, int]:
    """Sessions on each peer of a swarm that is online and answers, by its id, as these say themselves."""

    async def held(peer: PeerRecord) -> int | None:
        try:
            reply = await PeerStub(swarm.channels.to(peer)).Ping(PingRequest(), timeout=PING_S)  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError:
            return None
        return int(reply.sessions)

    async def all_held() -> dict[str, int]:
        view = swarm.view
        online = [peer for served in view.models for peer in view.online(served.fingerprint) if peer.addresses]
        counts = await asyncio.gather(*map(held, online))
        return {peer.peer_id: count for peer, count in zip(online, counts, strict=True) if count is not None}

    return swarm.call(all_held())


def sessions_held(model: SwarmModel) -> int:
    """Sessions on all peers of the model's swarm, as these say themselves."""
    view, held = model.swarm.view, sessions_by_peer(model.swarm)
    assert held.keys() == {peer.peer_id for served in view.models for peer in view.online(served.fingerprint)}
    return sum(held.values())
