from client.blame import Blame


def test_blame_decays() -> None:
    now = [0.0]
    blame = Blame(30.0, clock=lambda: now[0])
    blame.add("a")
    blame.add("b", retry_after_s=2.0)
    assert blame.avoided() == {"a", "b"}
    now[0] = 3.0
    assert blame.avoided() == {"a"}
    now[0] = 31.0
    assert blame.avoided() == frozenset()
