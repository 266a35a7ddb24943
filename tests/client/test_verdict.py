"""How far apart honest peers may be, and whom a third one convicts."""

from __future__ import annotations

import pytest
import torch

from client.blame import LIAR_S, Blame
from client.config import ClientConfig
from client.tolerance import Kind, Tolerance, bound, distances, row_distances, typical
from client.verdict import Distance, judge
from protocol.errors import ConfigError

NEAR, FAR = Distance(0.01, 0.1), Distance(0.5, 0.1)


@pytest.mark.parametrize(
    ("first", "from_audited", "from_auditor", "culprit"),
    [
        (NEAR, None, None, "nobody"),
        (FAR, None, None, "both"),
        (FAR, NEAR, FAR, "auditor"),
        (FAR, FAR, NEAR, "audited"),
        (FAR, FAR, FAR, "both"),
        (FAR, NEAR, NEAR, "both"),  # it stands between them, and convicts neither
        (Distance(torch.inf, 0.1), FAR, NEAR, "audited"),
    ],
)
def test_a_third_peer_decides(
    first: Distance, from_audited: Distance | None, from_auditor: Distance | None, culprit: str
) -> None:
    assert judge(first, from_audited, from_auditor) == culprit


def test_distances_are_of_each_token_over_the_larger_norm() -> None:
    one = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]], [[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]])
    other = one.clone()
    other[1, 1] = -other[1, 1]
    assert distances(one, other).tolist() == [0.0, 2.0, 0.0]
    other[0, 0, 0] = torch.nan
    assert distances(one, other)[0] == torch.inf
    assert distances(one, torch.zeros_like(one))[0] == 1.0


def test_coarser_numbers_may_be_further_apart() -> None:
    kinds = [Kind("float32"), Kind("float16"), Kind("bfloat16"), Kind("bfloat16", "int8"), Kind("bfloat16", "nf4")]
    against_float = [bound(kind, kinds[0], "int8") for kind in kinds]
    assert against_float == sorted(against_float)
    assert bound(kinds[-1], kinds[-1], "none") < bound(kinds[-1], kinds[2], "none"), (
        "with its like it is compared closer"
    )
    assert bound(Kind("x", "y"), Kind("float32"), "z") >= max(against_float), (
        "what is not known is taken for the coarsest"
    )
    assert bound(Kind("float32", ""), Kind("float32", "none"), "none") == bound(kinds[0], kinds[0], "none")


def test_float32_may_be_multiplied_as_in_float16() -> None:
    single, half = Kind("float32"), Kind("float16")
    assert bound(single, single, "none") == bound(half, single, "none") == pytest.approx(0.032)
    assert bound(single, single, "int8") < 0.29, "what faint noise was measured to do"


def test_what_is_typical_is_less_than_what_is_allowed_of_one_token() -> None:
    bf16 = Kind("bfloat16", "none")
    for kind in (Kind("float32"), bf16):
        within = Tolerance.between(kind, bf16, "int8", 9)
        assert within.of(64) == within.typical < within.of(1) == within.token
        assert within.typical < 0.057, "what 4 bits for weights were measured to do"
    assert typical(bf16, bf16, "int8", 9) < typical(bf16, bf16, "int8", 24), "rounding adds up from block to block"
    assert typical(bf16, bf16, "int8", 9) < typical(bf16, bf16, "int8", 9, crossings=3)
    assert typical(bf16, Kind("bfloat16", "nf4"), "int8", 9) > 4 * 0.16
    assert typical(Kind("x", "y"), bf16, "z", 9) >= typical(Kind("bfloat16", "nf4"), bf16, "int8", 9)


def test_distances_of_rows_are_their_own() -> None:
    one = torch.tensor([[[3.0, 4.0], [3.0, 4.0]], [[3.0, 4.0], [0.0, 0.0]]])
    assert row_distances(one, one * torch.tensor([[[1.0], [-1.0]], [[1.0], [1.0]]])).tolist() == [
        [0.0, 2.0],
        [0.0, 0.0],
    ]
    assert row_distances(one[None], one[None]).shape == (2, 2), "what some models have before rows"


def test_good_deeds_do_not_make_a_lie_forgotten() -> None:
    now_s = [0.0]
    blame = Blame(5.0, clock=lambda: now_s[0])
    blame.accuse("liar")
    blame.add("late")
    for peer in ("liar", "late"):
        blame.forgive(peer)
    assert blame.avoided() == {"liar"}
    now_s[0] = LIAR_S + 1
    assert not blame.avoided()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_audits_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="--audit is a share"):
        ClientConfig(audit=share)
