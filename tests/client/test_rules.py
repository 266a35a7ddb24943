"""Naming peers, and the flags that do it."""

from dataclasses import replace
from pathlib import Path

import pytest

from client.config import ClientConfig
from client.rules import Rules
from protocol.errors import ConfigError
from protocol.settings import load
from tests.client.test_chain import BLANK

PEER = replace(BLANK, peer_id="12D3KooWAbcdefGhijkl", public_name="Zoë's laptop")
SHORT = replace(PEER, public_name="zoe")
NAMELESS = replace(PEER, public_name="")


@pytest.mark.parametrize(
    ("name", "peer", "meant"),
    [
        ("12D3KooWAbcdefGhijkl", PEER, True),
        ("Ghijkl", PEER, True),
        ("hijkl", PEER, False),  # too short to be an end
        ("12D3KooW", PEER, False),  # the beginning says nothing: all have the same
        ("Zoë's laptop", PEER, True),
        ("laptop", PEER, False),
        ("zoe", SHORT, True),
        ("", NAMELESS, False),
    ],
)
def test_a_peer_is_named_by_its_id_the_end_of_it_or_its_public_name(name: str, peer: object, meant: bool) -> None:
    assert isinstance(peer, type(BLANK))
    assert Rules(route=(name,)).prefers(peer) is meant
    assert Rules(avoid=(name,)).allows(peer) is not meant


def test_a_public_name_is_not_trusted() -> None:
    assert not Rules(trust=("Zoë's laptop",), trusted_only=True).allows(PEER)
    assert Rules(trust=("Ghijkl",), trusted_only=True).allows(PEER)
    assert not Rules(trust=("Ghijkl",), trusted_only=True, avoid=("Ghijkl",)).allows(PEER)


def test_all_peers_are_allowed_and_none_preferred_by_default() -> None:
    assert Rules().allows(PEER)
    assert not Rules().prefers(PEER)
    assert ClientConfig().rules == Rules()


def test_rules_come_from_flags_and_variables() -> None:
    flags = {"route": ("Ghijkl",), "trusted_only": True}
    environ = {"POTLUCK_AVOID": "Mnopqr Stuvwx", "POTLUCK_TRUST": "Ghijkl"}
    config = load(ClientConfig, flags, section="client", environ=environ)
    assert config.rules == Rules(("Ghijkl",), ("Mnopqr", "Stuvwx"), ("Ghijkl",), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trusted_only": True}, "--trusted-only leaves no peer: name those you trust with --trust PEER"),
        ({"trust": ("zoe",)}, "--trust takes 6 or more characters of a peer's id, not 'zoe'"),
        ({"route": "Ghijkl"}, "route is a list of peers, not 'Ghijkl'"),
        ({"avoid": ("",)}, "avoid is a list of peers"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClientConfig(**settings)  # type: ignore[arg-type]
    assert caught.value.message.startswith(message)


def test_peers_may_be_named_in_files(tmp_path: Path) -> None:
    file = tmp_path / "peers"
    file.write_text("Ghijkl  # Zoë's\n\nMnopqr\n")
    config = ClientConfig(avoid=(f"@{file}", "Stuvwx"), trust=("@friends",))
    assert config.avoid == (f"@{file}", "Stuvwx"), "nothing is read by making it"
    assert replace(config, trust=()).with_lists().rules == Rules(avoid=("Ghijkl", "Mnopqr", "Stuvwx"))
    with pytest.raises(ConfigError, match=r"--trust @friends: the file cannot be read"):
        config.with_lists()
    file.write_text("zoe\n")
    with pytest.raises(ConfigError, match="6 or more characters"):
        ClientConfig(trust=(f"@{file}",)).with_lists()
