"""Which tokens of a hop and its shadow are too far off."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from client.comparison import Mismatch, compare
from client.config import ClientConfig
from client.encoding import entry_of
from client.model import SwarmModelForCausalLM
from client.peers import ModelPeers
from client.sample import LEAST, MOST, SEVERAL, Sample
from client.swarm import Swarm
from client.tolerance import Kind, Tolerance
from protocol.journal import Entry
from protocol.messages import HIDDEN
from protocol.span import Span
from slicing import load_span, resolve
from tests.harness import KnownPeers
from tests.slicing.architectures import N_BLOCKS, make_checkpoint

WITHIN, ODD, FAINT = Tolerance(0.1, 0.01), 0.5, 0.05


def entries(tensors: Sequence[Tensor]) -> list[Entry]:
    """One token each, as a log would have them: [rows, 1, width]."""
    return [entry_of({HIDDEN: tensor}, position, (), "none") for position, tensor in enumerate(tensors)]


def compared(told: Sequence[Tensor], *, is_routed: bool = False, seed: int = 0) -> Mismatch | None:
    """What a hop told, one token at a time, against all ones."""
    honest = [torch.ones(tensor.shape) for tensor in told]
    rng = random.Random(seed)
    return compare(entries(honest), entries(told), honest, WITHIN, len(told), Sample(), {}, rng, is_routed=is_routed)[1]


def tokens(apart: Sequence[float], rows: int = 1) -> list[Tensor]:
    """Tokens of which all rows are so far off."""
    return [torch.full((rows, 1, 8), 1 - each) for each in apart]


def test_a_single_token_proves_nothing_where_tokens_choose_experts() -> None:
    told = tokens([0.0] * 20 + [ODD] + [0.0] * 20)
    mismatch = compared(told)
    assert mismatch is not None
    assert [token.position for token in mismatch.tokens] == [20]
    assert compared(told, is_routed=True) is None


def test_several_tokens_or_the_median_do() -> None:
    mismatch = compared(tokens(([ODD] + [0.0] * 3) * 10), is_routed=True)
    assert mismatch is not None
    assert [token.position for token in mismatch.tokens] == list(range(0, 4 * SEVERAL, 4))
    assert (mismatch.position, mismatch.apart.bound, mismatch.is_typical) == (0, WITHIN.token, False)
    mismatch = compared(tokens([FAINT] * LEAST), is_routed=True)
    assert mismatch is not None
    assert (len(mismatch.tokens), mismatch.apart.bound, mismatch.is_typical) == (LEAST, WITHIN.typical, True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_always_does(value: float) -> None:
    told = tokens([0.0] * 3)
    told[1][0, 0, 0] = value
    assert compared(told, is_routed=True) is not None


def test_a_token_of_another_shape_always_does() -> None:
    honest = tokens([0.0] * 3)
    told = [honest[0], torch.ones(1, 1, 9), honest[2]]
    found = compare(entries(honest), entries(told), honest, WITHIN, 3, Sample(), {}, random.Random(), is_routed=True)[1]
    assert found is not None
    assert found.position == 1


def test_a_third_peer_is_measured_by_what_was_exceeded() -> None:
    several = compared(tokens([ODD] * SEVERAL), is_routed=True)
    typical = compared(tokens([FAINT] * LEAST), is_routed=True)
    for mismatch, limit in ((several, WITHIN.token), (typical, WITHIN.typical)):
        assert mismatch is not None
        honest = tokens([0.0] * LEAST)
        to_hop, to_shadow = mismatch.from_third(entries(honest), honest, WITHIN, WITHIN)
        assert to_hop is not None
        assert to_shadow is not None
        assert (to_hop.bound, to_shadow.bound) == (limit, limit)
        assert not to_hop.agrees
        assert to_shadow.agrees


def test_nobody_knows_beforehand_which_row_counts() -> None:
    """Who lies a little in all rows but one of each token, in turn, is found, and draws differ."""
    told = tokens([FAINT] * MOST, rows=4)
    for position, token in enumerate(told):
        token[position % 4] = 1.0
    drawn: list[tuple[int, ...]] = []
    for seed in range(8):
        mismatch = compared(told, seed=seed)
        assert mismatch is not None
        drawn.append(tuple(token.row for token in mismatch.tokens))
    assert len(set(drawn)) == len(drawn)
    assert set(Counter(row for rows in drawn for row in rows)) == set(range(4)), "each row now and then"
    again = compared(told, seed=0)
    assert again is not None
    assert tuple(token.row for token in again.tokens) == drawn[0]


@torch.inference_mode()
def test_honest_peers_that_choose_other_experts_are_not_accused(tmp_path: Path) -> None:
    make_checkpoint("gpt_oss", tmp_path)
    span, source = Span(0, N_BLOCKS), resolve(str(tmp_path))
    audited, auditor = (load_span(source, span, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    within = Tolerance.between(Kind("bfloat16"), Kind("float32"), "none", N_BLOCKS)
    torch.manual_seed(0)
    accused: list[bool] = []
    for _ in range(4):
        hidden = torch.randn(1, 192, 64)
        cache = audited.new_cache()
        told = [audited.step(token.bfloat16(), cache).float() for token in torch.split(hidden, 1, dim=1)]
        again = list(torch.split(auditor.step(hidden, auditor.new_cache()), 1, dim=1))
        for is_routed in (False, True):
            rng, sample = random.Random(0), Sample()
            logs = entries(again), entries(told), again
            found = compare(*logs, within, 192, sample, {}, rng, is_routed=is_routed)[1]
            assert found is None or not is_routed
            accused.append(found is not None)
    assert any(accused), "where the model were dense, somebody would be"


@pytest.mark.parametrize(("name", "is_routed"), [("llama", False), ("mixtral", True)])
def test_sessions_know_by_the_models_configuration(name: str, is_routed: bool, tmp_path: Path) -> None:
    make_checkpoint(name, tmp_path)
    config = ClientConfig()
    swarm = Swarm(config)
    model = SwarmModelForCausalLM.from_pretrained(str(tmp_path), swarm=swarm, config=config)
    peers = cast(ModelPeers, KnownPeers([]))
    assert model.blocks._new_session(peers, "none", rows=1).spec.is_routed == is_routed
