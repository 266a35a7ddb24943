"""What each client may have of a peer, and as whom it counts. No clock, no network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer import accounts as module
from peer.accounts import KEY_S, MOST_PAUSE_S, Account, Accounts, Allowance, home_of
from peer.bucket import Bucket
from peer.config import PeerConfig
from protocol.errors import PeerFull

ALLOWANCE = Allowance(
    sessions=4, opens_per_s=2.0, opens_at_once=5, tokens=100, bytes_per_s=1000.0, share=0.5, keys=3, streams=2
)
HOME = "192.0.2.7"


# ---------------------------------------------------------------------------- as whom a client counts


@pytest.mark.parametrize(
    ("peer", "home"),
    [
        ("ipv4:192.0.2.7:5000", "192.0.2.7"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::/64"),
        ("ipv6:[2001:db8::ffff:1]:7", "2001:db8::/64"),
        ("ipv6:%5B2001:db8:0:1::1%5D:5000", "2001:db8:0:1::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:5000", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", "fe80::/64"),
        ("unix:/run/potluck", "unix"),
        ("", ""),
    ],
)
def test_an_address_is_a_home(peer: str, home: str) -> None:
    assert home_of(peer) == home


def test_keys_have_accounts_and_who_signs_nothing_shares_the_address() -> None:
    accounts = Accounts(ALLOWANCE)
    assert accounts.of(HOME, "key1", 0.0) is accounts.of(HOME, "key1", 1.0)
    assert accounts.of(HOME, "", 0.0) is accounts.of(HOME, "", 0.0)
    assert {accounts.of(HOME, key, 0.0).name for key in ("key1", "key2", "")} == {"key1", "key2", HOME}
    assert accounts.of("198.51.100.1", "key1", 0.0) is accounts.of(HOME, "key1", 0.0), "one that moves is the same"


def test_an_address_counts_as_a_few_accounts_however_many_keys_are_made_there() -> None:
    accounts = Accounts(ALLOWANCE)
    names = {accounts.of(HOME, f"key{number}", number / 1000).name for number in range(1000)}
    assert names == {"key0", "key1", "key2", HOME}
    assert accounts.of("198.51.100.1", "other", 1.0).name == "other", "nobody elsewhere pays for that"
    assert accounts.of(HOME, "key1", 1.0).name == "key1", "nor do those that were there before"


def test_a_key_that_is_gone_makes_room_for_another_one() -> None:
    accounts = Accounts(ALLOWANCE)
    for key in ("key1", "key2", "key3"):
        accounts.of(HOME, key, 0.0)
    accounts.of(HOME, "key2", KEY_S / 2)
    accounts.of(HOME, "key3", KEY_S / 2)
    assert accounts.of(HOME, "key4", KEY_S - 1).name == HOME
    assert accounts.of(HOME, "key4", KEY_S).name == "key4"
    assert accounts.of(HOME, "key1", KEY_S).name == HOME


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ACCOUNTS", 10)
    accounts = Accounts(ALLOWANCE)
    kept = accounts.of("here", "kept", 0.0)
    for number in range(1000):
        accounts.of(f"address {number}", f"key {number}", 0.0)
        assert accounts.of("here", "kept", 0.0) is kept, "who comes again and again is remembered"
    assert len(accounts) == 10 and len(accounts._keys) == 10


# ---------------------------------------------------------------------------- what it may have


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 8)), max_size=60))
def test_a_bucket_never_gives_more_than_comes_in(pauses: list[tuple[float, float]]) -> None:
    bucket, now_s, given_out = Bucket(2.0, 5.0), 100.0, 0.0
    for pause_s, amount in pauses:
        now_s += pause_s
        if bucket.wait_s(amount, now_s) == 0.0:
            bucket.take(amount, now_s)
            given_out += amount
    assert given_out <= 5.0 + 2.0 * (now_s - 100.0) + 1e-6


def test_a_bucket_says_when_to_come_again() -> None:
    bucket = Bucket(2.0, 5.0)
    bucket.take(5.0, 0.0)
    assert bucket.wait_s(1.0, 0.0) == 0.5
    assert bucket.wait_s(1.0, 0.5) == 0.0
    assert Bucket(math.inf, math.inf).wait_s(1e30, 0.0) == 0.0


def test_sessions_are_opened_at_a_rate() -> None:
    account = Account("key", ALLOWANCE)
    for _ in range(5):
        account.note_open(0.0)
    with pytest.raises(PeerFull, match="more than 2 sessions per second") as caught:
        account.note_open(0.0)
    assert caught.value.retryable and caught.value.retry_after_s == 0.5
    account.note_open(0.5)


def test_steps_under_way_are_bounded_by_tokens_and_by_bytes() -> None:
    account = Account("key", ALLOWANCE)
    account.hold(900, 90, most_bytes=1000)
    with pytest.raises(PeerFull, match="90 tokens under way, of 100 at most"):
        account.hold(1, 11, most_bytes=1000)
    with pytest.raises(PeerFull, match="while others have sessions"):
        account.hold(101, 1, most_bytes=1000)
    account.hold(100, 10, most_bytes=1000)
    account.release(1000, 100)
    assert (account.nbytes, account.tokens) == (0, 0)
    account.hold(5000, 1, most_bytes=1000)  # one step alone is bounded by what a step may have
    with pytest.raises(AssertionError):
        account.release(5001, 1)


def test_who_sends_more_is_read_later() -> None:
    accounts = Accounts(ALLOWANCE, bytes_per_s=10_000.0)
    greedy, polite = accounts.of(HOME, "greedy", 0.0), accounts.of(HOME, "polite", 0.0)
    assert accounts.pause_s(greedy, 1000, 0.0) == 0.0
    assert accounts.pause_s(greedy, 500, 0.0) == 0.5
    assert accounts.pause_s(polite, 1000, 0.0) == 0.0, "the other one's debts are its own"
    assert accounts.pause_s(None, 10_000, 0.0) == pytest.approx(0.25), "together they have a limit, too"


def test_who_asks_again_and_again_waits_for_its_refusals() -> None:
    accounts = Accounts(ALLOWANCE)
    assert [accounts.refused(HOME, 0.0) for _ in range(8)] == [0.0] * 5 + [0.5, 1.0, 1.5]
    assert max(accounts.refused(HOME, 0.0) for _ in range(1000)) == MOST_PAUSE_S
    assert accounts.refused("198.51.100.1", 0.0) == 0.0
    assert accounts.refused(HOME, 60.0) == 0.0, "what was asked in vain is forgotten soon"


def test_streams_are_counted_by_address() -> None:
    accounts = Accounts(ALLOWANCE)
    accounts.enter(HOME)
    accounts.enter(HOME)
    with pytest.raises(PeerFull, match="2 streams from one address"):
        accounts.enter(HOME)
    accounts.enter("198.51.100.1")
    accounts.leave(HOME)
    accounts.enter(HOME)
    for _ in range(2):
        accounts.leave(HOME)
    accounts.leave("198.51.100.1")
    assert not accounts._streams, "nothing is kept of those who left"


def test_defaults_let_an_honest_client_use_all_its_sessions() -> None:
    config = PeerConfig()
    assert config.allowance.sessions <= config.max_sessions
    assert config.allowance.tokens >= config.allowance.sessions * 8 * 1024, "eight chunks of a prompt in each"
    assert config.allowance.opens_at_once >= config.allowance.sessions, "all at once, after a loss"
    assert replace(config, client_sessions=2).allowance.sessions == 2
