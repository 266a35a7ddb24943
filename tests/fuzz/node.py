"""What other nodes of the DHT ask ours to store, and to look up: hivemind's own handlers, behind our validator.

Allowed: any error of hivemind's, which it answers with. Whatever was asked, only what was signed is stored, under the
key, by the signer and until the time that the signature names; and no more of it than `dht.validator` allows.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgpack
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import RoutingTable

from dht.envelope import unseal
from dht.kademlia import DHTID, DictionaryDHTValue, dht_pb2
from dht.record import MODELS_KEY, ModelRecord
from dht.validator import MAX_SUBKEYS, CappedStorage, PotluckValidator, Verifier
from protocol.identity import Identity
from tests.fuzz.source import Source, as_pieces
from tests.fuzz.target import Target

NOW = 4_000_000_000.0  # far ahead: hivemind's storage looks at the clock itself
BUCKET, DEPTH = 20, 5
CALLER = SimpleNamespace(remote_id=None, local_id=None)

_loop = asyncio.new_event_loop()


def run(data: bytes) -> None:
    """A few requests, each after its length; what each asks for by its first byte."""
    _loop.run_until_complete(_asked(data))


async def _asked(data: bytes) -> None:
    node = _node()
    for piece in Source(data).pieces():
        try:
            if piece[:1] == b"\1":
                await node.rpc_find(dht_pb2.FindRequest.FromString(piece[1:]), CALLER)
            else:
                await node.rpc_store(dht_pb2.StoreRequest.FromString(piece[1:]), CALLER)
        except Exception:  # noqa: BLE001  # whatever it is, hivemind tells it the caller
            continue
        await asyncio.sleep(0)  # the pings that hivemind has begun
    for storage in (node.storage, node.cache):
        _check(storage)


def _node() -> Any:
    """A node of hivemind's without a network."""
    node: Any = DHTProtocol(_initialized_with_create=True)
    node.node_id = DHTID.generate(source=b"node")
    node.bucket_size = BUCKET
    node.routing_table = RoutingTable(node.node_id, BUCKET, DEPTH)
    node.node_info = dht_pb2.NodeInfo(node_id=node.node_id.to_bytes())
    node.storage, node.cache = CappedStorage(), CappedStorage()
    node.record_validator = PotluckValidator(Verifier(), lambda: NOW, Counter())
    node.rpc_ping = _no_ping
    return node


async def _no_ping(request: Any, context: Any) -> None:
    """Whom a stranger names as itself is not asked back."""


def _check(storage: Any) -> None:
    for key, item in storage.items():
        assert isinstance(item.value, DictionaryDHTValue)
        assert len(item.value) <= MAX_SUBKEYS
        for subkey, entry in item.value.items():
            envelope = unseal(msgpack.unpackb(entry.value))
            assert envelope.signer == subkey
            assert envelope.expires_at == entry.expiration_time
            assert DHTID.generate(source=envelope.key) == key


def seeds() -> list[bytes]:
    """Records that are stored by themselves and in a dictionary, and looked up."""
    identity = Identity.ephemeral()
    key = DHTID.generate(source=MODELS_KEY).to_bytes()
    stored = []
    for sequence in (1, 2):
        expires_at = NOW + 30 * sequence
        raw = ModelRecord(identity.peer_id, "m", "f" * 32, 4, sequence=sequence, expires_at=expires_at).encode(identity)
        value, subkey = msgpack.packb(raw), msgpack.packb(identity.peer_id)
        single = dht_pb2.StoreRequest(
            keys=[key], subkeys=[subkey], values=[value], expiration_time=[expires_at], in_cache=[sequence == 2]
        )
        whole = DictionaryDHTValue()
        whole.store(identity.peer_id, value, expires_at)
        several = dht_pb2.StoreRequest(
            keys=[key],
            subkeys=[b""],
            values=[DHTProtocol.serializer.dumps(whole)],
            expiration_time=[expires_at],
            in_cache=[False],
        )
        stored += [b"\0" + single.SerializeToString(), b"\0" + several.SerializeToString()]
    find = b"\1" + dht_pb2.FindRequest(keys=[key]).SerializeToString()
    return [as_pieces([each, find]) for each in stored] + [as_pieces([*stored[::2], find])]


TARGET = Target("node", run, seeds, modules=("dht.validator", "dht.envelope"), short=800)
