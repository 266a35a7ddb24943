"""What a node of ours agrees to store and to pass on: current, signed Potluck records under their own key and subkey.

hivemind asks the validator for each record that arrives, on the loop; each is verified once and remembered. A node
checks envelopes only, not payloads, so that nodes of an older release keep storing records of newer peers. Readers
check everything again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import msgpack

from dht.config import MAX_EXPIRY_S
from dht.envelope import MAX_RAW_BYTES, TOO_LARGE, Envelope, unseal
from dht.kademlia import (
    DHTID,
    DHTLocalStorage,
    DHTRecord,
    DictionaryDHTValue,
    RecordValidatorBase,
    ValueWithExpiration,
)
from protocol.errors import BadRecord
from protocol.join_token import NO_PROOF, JoinToken
from protocol.limits import PROOF_BYTES

MAX_PACKED_BYTES = MAX_RAW_BYTES + PROOF_BYTES + 16
MAX_REMEMBERED = 8192
MAX_SUBKEYS = 1024
MAX_BYTES_PER_KEY = 3 << 20
"""A key is read in one message, and hivemind's daemon passes at most 4 MiB."""
MAX_KEYS = 4096
STORAGE_CLOCK_SLACK_S = 5.0


class Verifier:
    """`unseal` with a memory, shared by the validator (on the loop) and readers (in threads).

    Args:
        token: of a private swarm, whose members' records alone are taken; None: the swarm is open.
    """

    def __init__(self, capacity: int = MAX_REMEMBERED, token: JoinToken | None = None) -> None:
        self._token = token
        self._capacity = capacity
        self._known: OrderedDict[bytes, Envelope | BadRecord] = OrderedDict()
        self._lock = threading.Lock()

    def unseal(self, raw: object) -> Envelope:
        """As `dht.envelope.unseal`.

        Raises:
            BadRecord: likewise.
        """
        if self._token is not None:
            if not isinstance(raw, bytes) or len(raw) > MAX_RAW_BYTES + PROOF_BYTES:
                raise BadRecord(NO_PROOF)
            raw = self._token.unseal(raw)
        if not isinstance(raw, bytes) or len(raw) > MAX_RAW_BYTES:
            return unseal(raw)
        digest = hashlib.sha256(raw).digest()
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
        if known is None:
            try:
                known = unseal(raw)
            except BadRecord as error:
                known = BadRecord(error.message)
            with self._lock:
                self._known[digest] = known
                if len(self._known) > self._capacity:
                    self._known.popitem(last=False)
        if isinstance(known, BadRecord):
            raise BadRecord(known.message)
        return known

    def place(self, key: str) -> str:
        """Under what the records of `key` are kept in the DHT."""
        return key if self._token is None else self._token.place(key)

    def seal(self, raw: bytes) -> bytes:
        """A record of this node's own, as `unseal` takes it."""
        return raw if self._token is None else self._token.seal(raw)


class PotluckValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """hivemind's hook: True if `record` may be stored here or believed when another node sends it.

    Attributes:
        refused: how many records were not, by reason.
    """

    def __init__(self, verifier: Verifier, now: Callable[[], float], refused: Counter[str]) -> None:
        self.refused = refused
        self._verifier = verifier
        self._now = now

    def validate(self, record: DHTRecord) -> bool:
        try:
            self._check(record)
        except BadRecord as error:
            self.refused[error.message] += 1
            return False
        return True

    def _check(self, record: DHTRecord) -> None:
        if len(record.value) > MAX_PACKED_BYTES or len(record.subkey) > 2 * MAX_PACKED_BYTES:
            raise BadRecord(TOO_LARGE)
        envelope = self._verifier.unseal(_unpack(record.value))
        if _unpack(record.subkey) != envelope.signer:
            raise BadRecord("the subkey is not the signer")
        if DHTID.generate(source=self._verifier.place(envelope.key)).to_bytes() != record.key:
            raise BadRecord("the record lies under another key than it names")
        if record.expiration_time != envelope.expires_at:
            raise BadRecord("the record's expiry is not the signed one")
        # An expired record is not refused: it may expire on its way here, and one refusal drops a whole answer of
        # another node. The storage forgets it by itself, and readers refuse it.
        if record.expiration_time > self._now() + MAX_EXPIRY_S + STORAGE_CLOCK_SLACK_S:
            raise BadRecord("the record would live too long")


class CappedStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind has no types
    """hivemind's storage with bounded keys, subkeys and bytes, so that strangers cannot fill this node's memory.

    When a bound is reached the newcomer is refused: whoever is stored and renews in time stays.
    """

    def store(self, key: Any, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        if subkey is not None:
            return self.store_subkey(key, subkey, value, expiration_time)
        if not isinstance(value, DictionaryDHTValue):
            return False  # all our records have a subkey
        return bool(super().store(key, value, expiration_time))

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        found = self.get(key)
        if found is None:
            return len(self) < MAX_KEYS and bool(super().store_subkey(key, subkey, value, expiration_time))
        present = found.value
        known = present.get(subkey)
        if known is not None:
            # hivemind would refuse an older record too, but then forget the newer one when the older expires
            if known.expiration_time >= expiration_time:
                return False
        elif len(present) >= MAX_SUBKEYS:
            return False
        room = MAX_BYTES_PER_KEY - sum(len(item.value) for _, item in present.items())
        if len(value) - (len(known.value) if known is not None else 0) > room:
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))


def _unpack(data: bytes) -> object:
    try:
        return msgpack.unpackb(data, max_ext_len=0)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError):
        raise BadRecord("the record does not unpack") from None


def guard(protocol: Any, verdicts: Counter[str]) -> None:
    """Put a running node's protocol behind our bounds: capped storage, and answers of other nodes made harmless.

    `verdicts`: counts what other nodes said to records of ours, `taken` or `refused`.

    hivemind believes two fields that no signature covers: an answer's own expiry (infinity would end a search early,
    hiding what honest nodes know) and a dictionary's `maxsize` (1 would make it forget, a text would raise).
    """
    storage = CappedStorage()
    for key, item in protocol.storage.items():
        if isinstance(item.value, DictionaryDHTValue):
            for subkey, entry in item.value.items():
                storage.store_subkey(key, subkey, entry.value, entry.expiration_time)
    protocol.storage, protocol.cache = storage, CappedStorage()
    call_find, call_store = protocol.call_find, protocol.call_store

    async def told_call_store(*args: Any, **kwargs: Any) -> Any:
        stored = await call_store(*args, **kwargs)
        for answer in stored or ():
            verdicts["taken" if answer else "refused"] += 1
        return stored

    async def guarded_call_find(peer: Any, keys: Any) -> Any:
        found = await call_find(peer, keys)
        return None if found is None else {key: (_harmless(value), near) for key, (value, near) in found.items()}

    protocol.call_find, protocol.call_store = guarded_call_find, told_call_store


def _harmless(answer: Any) -> Any:
    """A found dictionary without its sender's claims about it; anything else is not ours."""
    if answer is None or not isinstance(answer.value, DictionaryDHTValue):
        return None
    clean = DictionaryDHTValue()
    with answer.value.freeze():
        for subkey, entry in answer.value.items():
            clean.store(subkey, entry.value, entry.expiration_time)
    if not clean:
        return None
    return ValueWithExpiration(clean, clean.latest_expiration_time)
