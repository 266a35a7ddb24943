"""What a node of ours stores and believes: hivemind's hooks, driven without a network."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import msgpack
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.utils.timed_storage import ValueWithExpiration

from dht import validator as module
from dht.record import MODELS_KEY, peer_key
from dht.validator import CappedStorage, PotluckValidator, Verifier, guard
from protocol.join_token import NO_PROOF, JoinToken
from protocol.limits import PROOF_BYTES
from tests.dht.support import MODEL, NOW, OTHER_MODEL, identity, listing, peer

KEY = peer_key(MODEL, 0)
RAW = peer(0).encode(identity(0))


def stored(raw: object = RAW, key: str = KEY, subkey: object = None, expires_at: float = NOW + 60) -> DHTRecord:
    """A record as hivemind hands it to the validator."""
    subkey = identity(0).peer_id if subkey is None else subkey
    return DHTRecord(DHTID.generate(source=key).to_bytes(), msgpack.packb(subkey), msgpack.packb(raw), expires_at)


def make_validator(now: float = NOW) -> PotluckValidator:
    return PotluckValidator(Verifier(), lambda: now, Counter())


def test_signed_records_are_stored() -> None:
    validator = make_validator()
    assert validator.validate(stored())
    assert validator.validate(stored(listing(0).encode(identity(0)), MODELS_KEY))
    assert not validator.refused


def test_payloads_of_newer_software_are_stored() -> None:
    from dht.envelope import seal

    raw = seal(identity(0), kind="peer", key=KEY, sequence=1, expires_at=NOW + 60, payload=b"not for us to judge")
    assert make_validator().validate(stored(raw))


@pytest.mark.parametrize(
    "record",
    [
        stored(key=peer_key(OTHER_MODEL, 0)),
        stored(subkey=identity(1).peer_id),
        stored(subkey=7),
        stored(subkey=[]),
        stored(expires_at=NOW + 61),
        stored(expires_at=math.inf),
        stored(expires_at=math.nan),
        stored(b"garbage"),
        stored("text"),
        stored(RAW[:-1] + bytes([RAW[-1] ^ 1])),
        stored(b"x" * 100_000),
        DHTRecord(b"", b"", b"", NOW),
        DHTRecord(stored().key, b"\xc0", stored().value, NOW + 60),
        DHTRecord(stored().key, stored().subkey, b"\x91" * 9000, NOW + 60),
    ],
)
def test_everything_else_is_refused_and_counted(record: DHTRecord) -> None:
    validator = make_validator()
    assert not validator.validate(record)
    assert validator.refused.total() == 1


def test_a_record_with_a_far_expiry_is_refused() -> None:
    raw = peer(expires_at=NOW + 3600).encode(identity(0))
    assert not make_validator().validate(stored(raw, expires_at=NOW + 3600))
    assert make_validator(NOW + 3550).validate(stored(raw, expires_at=NOW + 3600))


def test_an_expired_record_spoils_no_answer() -> None:
    assert make_validator(NOW + 61).validate(stored())


def test_reasons_are_few_whatever_strangers_send() -> None:
    validator = make_validator()
    for index in range(300):
        validator.validate(stored(bytes([index % 256]) * index))
    assert len(validator.refused) <= 3


# ---------------------------------------------------------------------------- storage

LATER = time.time() + 600
"""The storage looks at the real clock."""


def test_the_storage_keeps_what_hivemind_would() -> None:
    storage, key = CappedStorage(), DHTID.generate(source="key")
    assert storage.store(key, b"1", LATER, subkey="a")
    assert storage.store_subkey(key, "a", b"2", LATER + 1)
    assert storage.store_subkey(key, "b", b"3", LATER)
    assert {name: item.value for name, item in storage.get(key).value.items()} == {"a": b"2", "b": b"3"}


def test_an_older_record_neither_replaces_nor_shortens_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """hivemind forgets the newer one when the older expires: shown on its own storage first."""
    now = time.time()
    kept = {}
    for kind in (DHTLocalStorage, CappedStorage):
        with monkeypatch.context() as patch:
            storage, key = kind(), DHTID.generate(source="key")
            assert storage.store_subkey(key, "a", b"new", now + 60)
            assert not storage.store_subkey(key, "a", b"old", now + 5)
            patch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 10)
            kept[kind] = dict(storage.get(key).value.items())
    assert not kept[DHTLocalStorage], "hivemind repaired this: our check is not needed any more"
    assert kept[CappedStorage]


def test_values_without_a_subkey_are_not_stored() -> None:
    storage, key = CappedStorage(), DHTID.generate(source="key")
    assert not storage.store(key, b"1", LATER)
    storage.store_subkey(key, "a", b"1", LATER)
    assert not storage.store(key, b"wipe", LATER + 100)
    assert storage.get(key).value.get("a").value == b"1"


def test_subkeys_are_capped_and_who_renews_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUBKEYS", 3)
    storage, key = CappedStorage(), DHTID.generate(source="key")
    assert [storage.store_subkey(key, name, b"1", LATER) for name in "abcd"] == [True, True, True, False]
    assert storage.store_subkey(key, "a", b"2", LATER + 1)
    assert not storage.store_subkey(key, "d", b"1", LATER + 99)


def test_bytes_of_a_key_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES_PER_KEY", 100)
    storage, key = CappedStorage(), DHTID.generate(source="key")
    assert storage.store_subkey(key, "a", b"x" * 90, LATER)
    assert not storage.store_subkey(key, "b", b"x" * 11, LATER)
    assert storage.store_subkey(key, "a", b"x" * 100, LATER + 1)
    assert not storage.store_subkey(key, "a", b"x" * 101, LATER + 2)


def test_keys_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    storage = CappedStorage()
    keys = [DHTID.generate(source=name) for name in "abc"]
    assert [storage.store_subkey(key, "a", b"1", LATER) for key in keys] == [True, True, False]


# ---------------------------------------------------------------------------- answers of other nodes


class FakeProtocol:
    """As much of hivemind's `DHTProtocol` as `guard` touches."""

    def __init__(self, answer: Any) -> None:
        self.storage, self.cache = DHTLocalStorage(), DHTLocalStorage()
        self._answer = answer

    async def call_find(self, peer: object, keys: object) -> Any:
        return self._answer

    async def call_store(self, peer: object, keys: object) -> Any:
        return self._answer


def hostile(maxsize: Any) -> DictionaryDHTValue:
    answer = DictionaryDHTValue()
    answer.store("a", b"1", LATER)
    answer.maxsize, answer.latest_expiration_time = maxsize, math.inf
    return answer


@pytest.mark.parametrize("maxsize", [1, 0, "text", None, math.nan])
async def test_claims_of_an_answer_are_not_believed(maxsize: Any) -> None:
    key = DHTID.generate(source="key")
    protocol = FakeProtocol({key: (ValueWithExpiration(hostile(maxsize), math.inf), {"near": 1})})
    guard(protocol, Counter())
    value, near = (await protocol.call_find("peer", [key]))[key]
    assert value.expiration_time == LATER and near == {"near": 1}
    merged = DictionaryDHTValue()
    merged.maxsize = max(merged.maxsize, value.value.maxsize)
    for name in ("b", "c"):
        assert merged.store(name, b"2", LATER)
    assert len(merged) == 2


async def test_answers_that_are_no_records_are_not_found() -> None:
    key = DHTID.generate(source="key")
    for answer in (None, ValueWithExpiration(b"plain", LATER), ValueWithExpiration(DictionaryDHTValue(), math.inf)):
        protocol = FakeProtocol({key: (answer, {})})
        guard(protocol, Counter())
        assert await protocol.call_find("peer", [key]) == {key: (None, {})}
    protocol = FakeProtocol(None)
    guard(protocol, Counter())
    assert await protocol.call_find("peer", [key]) is None


def test_what_was_stored_before_the_guard_is_kept() -> None:
    protocol, key = FakeProtocol(None), DHTID.generate(source="key")
    protocol.storage.store_subkey(key, "a", b"1", LATER)
    guard(protocol, Counter())
    assert isinstance(protocol.storage, CappedStorage)
    assert protocol.storage.get(key).value.get("a").value == b"1"


async def test_what_others_say_to_records_of_ours_is_counted() -> None:
    verdicts: Counter[str] = Counter()
    for answer in ([True, False], None, [False]):
        protocol = FakeProtocol(answer)
        guard(protocol, verdicts)
        assert await protocol.call_store("peer", ["key"]) == answer
    assert verdicts == {"taken": 1, "refused": 2}


# ---------------------------------------------------------------------------- private swarms

TOKEN = JoinToken.new()


def private(token: JoinToken, raw: bytes = RAW, key: str = KEY) -> DHTRecord:
    """A record as a member of the private swarm of `token` publishes it."""
    expiry = NOW + 60
    place = DHTID.generate(source=token.place(key)).to_bytes()
    return DHTRecord(place, msgpack.packb(identity(0).peer_id), msgpack.packb(token.seal(raw)), expiry)


def member_validator(token: JoinToken = TOKEN) -> PotluckValidator:
    return PotluckValidator(Verifier(token=token), lambda: NOW, Counter())


def test_members_take_each_others_records() -> None:
    assert member_validator().validate(private(TOKEN))
    assert member_validator().validate(private(TOKEN, listing(0).encode(identity(0)), MODELS_KEY))


def test_members_take_records_of_nobody_else() -> None:
    validator = member_validator()
    assert not validator.validate(stored()), "no proof, and under the key of an open swarm"
    assert not validator.validate(private(JoinToken.new())), "the proof of another token"
    bare = private(TOKEN)
    assert not validator.validate(DHTRecord(bare.key, bare.subkey, msgpack.packb(RAW), NOW + 60)), "no proof"
    other = peer(1).encode(identity(1))
    lent = TOKEN.seal(RAW)[-PROOF_BYTES:]
    forged = DHTRecord(bare.key, msgpack.packb(identity(1).peer_id), msgpack.packb(other + lent), NOW + 60)
    assert not validator.validate(forged), "the proof of another's record"
    assert validator.refused == {NO_PROOF: 4}


def test_open_swarms_take_no_records_of_private_ones() -> None:
    assert not make_validator().validate(private(TOKEN))
    assert TOKEN.place(KEY) != KEY and TOKEN.text not in TOKEN.place(KEY)
