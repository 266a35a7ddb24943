import re

from protocol import errors
from protocol.errors import BlocksMissing, IllegalCut, PeerError, PeerFull, PotluckError, UserError, from_wire


def _all(root: type[PotluckError]) -> list[type[PotluckError]]:
    return [root, *(c for child in root.__subclasses__() for c in _all(child))]


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in _all(PotluckError)]
    assert len(set(codes)) == len(codes)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = set(re.findall(r"[─ ] (\w+?)  ", errors.__doc__ or "")) | {"PotluckError"}
    assert {cls.__name__ for cls in _all(PotluckError)} <= drawn


def test_every_error_crosses_the_wire_as_itself() -> None:
    for cls in _all(PotluckError):
        error = from_wire(cls.code, "why", retryable=True, retry_after_s=2.5, peer_id="Qm")
        assert type(error) is cls
        assert (error.message, error.retryable, error.retry_after_s, error.peer_id) == ("why", True, 2.5, "Qm")


def test_a_newer_peers_unknown_error_is_a_peer_error() -> None:
    assert type(from_wire("from-the-future", "?", retryable=False)) is PeerError


def test_what_can_be_retried() -> None:
    assert PeerFull("full").retryable
    assert BlocksMissing("blocks 1:2 have no peer", missing=["1:2"]).retryable
    assert not UserError("no").retryable
    assert IllegalCut("no", nearest=["0:4"]).nearest == ("0:4",)
