import json
from dataclasses import replace

import pytest

from client.status import render
from dht.record import ModelRecord
from dht.summary import summary
from dht.view import SwarmView
from protocol.span import Span
from tests.client.test_chain import BLANK


def view(*spans: str) -> SwarmView:
    found = tuple(replace(BLANK, peer_id=f"Qm-peer-{i}", span=Span.parse(s), step_ms=1.5) for i, s in enumerate(spans))
    return SwarmView(as_of=1.0, models=(ModelRecord("Qm-peer-0", "tiny [red]", "f", 12),), peers_by_model={"f": found})


def test_the_summary_is_plain_data_without_addresses() -> None:
    found = summary(view("0:5", "4:7"))
    (model,) = json.loads(json.dumps(found))["models"]
    assert model["missing"] == ["7:12"]
    assert model["replicas"] == [1, 1, 1, 1, 2, 1, 1, 0, 0, 0, 0, 0]
    assert "127.0.0.1" not in json.dumps(found)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [(("0:5", "4:7"), "blocks 7:12 have no peer"), (("0:12",), "all 12 blocks are served, the weakest by 1 peer")],
)
def test_the_table_begins_with_the_answer(
    spans: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    render(summary(view(*spans)))
    shown = capsys.readouterr().out
    assert expected in shown
    assert "tiny [red]" in shown, "names are not markup"


def test_an_empty_swarm_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    render(summary(SwarmView()))
    assert "python -m peer serve" in capsys.readouterr().out
