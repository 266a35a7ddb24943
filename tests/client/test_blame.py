"""Who failed this client lately: peers, and the edges between them. All of it decays."""

from dataclasses import dataclass

from client.blame import Blame


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_blame_decays() -> None:
    clock = Clock()
    blame = Blame(30.0, clock)
    blame.add("a")
    blame.add("b", retry_after_s=2.0)
    assert blame.avoided() == {"a", "b"}
    clock.now_s = 3.0
    assert blame.avoided() == {"a"}
    clock.now_s = 31.0
    assert blame.avoided() == frozenset()


def test_a_peer_that_fails_again_is_avoided_for_longer() -> None:
    clock = Clock()
    blame = Blame(30.0, clock)
    blame.add("a")
    clock.now_s = 20.0
    blame.add("a")
    clock.now_s = 49.0
    assert blame.avoided() == {"a"}
    clock.now_s = 50.0
    assert blame.avoided() == frozenset()


def test_cut_edges_decay() -> None:
    clock = Clock()
    blame = Blame(30.0, clock)
    blame.add_edge(("a", "b"))
    clock.now_s = 10.0
    blame.add_edge(("b", "c"))
    assert blame.cut_edges() == {("a", "b"), ("b", "c")}
    clock.now_s = 30.0
    assert blame.cut_edges() == {("b", "c")}, "as long as a peer is avoided, and no longer"
    blame.add_edge(("b", "c"))
    clock.now_s = 59.0
    assert blame.cut_edges() == {("b", "c")}
    clock.now_s = 60.0
    assert blame.cut_edges() == frozenset()


def test_an_edge_has_a_direction_and_its_peers_are_not_blamed() -> None:
    blame = Blame(30.0, Clock())
    blame.add_edge(("a", "b"))
    assert ("b", "a") not in blame.cut_edges()
    assert blame.avoided() == frozenset()
    blame.add("a")
    assert blame.cut_edges() == {("a", "b")}


def test_no_blame_at_all() -> None:
    blame = Blame(0.0, Clock())
    blame.add("a")
    blame.add_edge(("a", "b"))
    assert blame.avoided() == frozenset()
    assert blame.cut_edges() == frozenset()
