"""Few rows times a matrix: the same bits for one row, at most another rounding for rows of several sessions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from slicing.rows import SEED, TURNED_ROWS, FewRows, Ways, fastest_groups, hasten, in_parts, shared, turned, ways_for

BOTH = Ways(2, (TURNED_ROWS, 4, 4))


def layer(inner: int = 96, outer: int = 128, *, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(SEED)
    return nn.Linear(inner, outer, bias=bias, dtype=dtype)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_in_parts_is_the_product(shape: tuple[int, ...], bias: bool) -> None:
    plain = layer(bias=bias)
    x = rows(*shape)
    for parts in (2, 4):
        found = in_parts(x, plain.weight, plain.bias, parts)
        assert found.shape == plain(x).shape
        assert torch.allclose(found, plain(x), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_turned_is_the_product(bias: bool) -> None:
    plain, x = layer(bias=bias), rows(2, 3, 96)
    for at_once in (TURNED_ROWS, 6, 4, 2):
        found = turned(x, plain.weight, plain.bias, at_once)
        assert found.is_contiguous() and torch.allclose(found, plain(x), atol=1e-5)


@pytest.mark.parametrize(
    ("turned_s", "plain_s", "wanted"),
    [
        ((1.0, 1.1, 1.3), (2.0, 2.0, 2.0), (TURNED_ROWS, TURNED_ROWS, TURNED_ROWS)),
        ((1.0, 3.2, 3.3), (3.4, 3.0, 3.6), (TURNED_ROWS, 4, TURNED_ROWS)),
        ((1.0, 3.2, 5.0), (3.4, 3.0, 3.6), (TURNED_ROWS, 4, 0)),
        ((1.0, 1.5, 4.0), (1.0, 2.0, 3.6), (0, TURNED_ROWS, 8)),
    ],
)
def test_rows_go_in_the_groups_that_are_fastest(
    turned_s: tuple[float, ...], plain_s: tuple[float, ...], wanted: tuple[int, ...]
) -> None:
    assert tuple(fastest_groups(list(zip(turned_s, plain_s, strict=True)))) == wanted


def test_a_number_of_rows_that_was_not_tried_goes_by_the_next_larger_one() -> None:
    ways = Ways(1, (5, 6, 7))
    assert [ways.turns(n) for n in (1, 2, 4, 5, 8, 9, 16, 17, TURNED_ROWS, TURNED_ROWS + 1)] == [
        *(0, 5, 5, 6, 6, 7, 7, 7, 7, 0)
    ]


@pytest.mark.parametrize("inner", [64, 96, 1024])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_chosen_for_one_row_gives_its_bits(inner: int, bias: bool) -> None:
    """Law 1, whatever this machine chooses."""
    plain = layer(inner, 512, bias=bias)
    quick = nn.Sequential(copy.deepcopy(plain))
    hasten(quick, 2)
    for seed in range(20):
        x = torch.randn(1, 1, inner, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(quick(x), plain(x))


def test_only_a_shared_pass_is_rounded_otherwise() -> None:
    plain = layer()
    quick = nn.Sequential(copy.deepcopy(plain))
    hasten(quick, 2, lambda *_: BOTH)
    x = rows(1, 8, 96)
    assert torch.equal(quick(x), plain(x))
    with shared(True):
        assert torch.equal(quick(x), turned(x, plain.weight, None, 4))
        many = rows(1, TURNED_ROWS + 1, 96)
        assert torch.equal(quick(many), plain(many))
    assert torch.equal(quick(x), plain(x))


def test_weights_and_names_stay() -> None:
    model = nn.Sequential(layer(), nn.ReLU(), layer(128, 96, bias=True))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    hasten(model, 2, lambda *_: BOTH)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert [isinstance(part, FewRows) for part in model] == [True, False, True]
    assert isinstance(model[0], nn.Linear)


def test_others_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(layer(dtype=torch.bfloat16), Special(4, 4))
    hasten(model, 2, lambda *_: BOTH)
    assert not any(isinstance(part, FewRows) for part in model)
    plain = nn.Sequential(layer())
    hasten(plain, 2, lambda *_: Ways())
    assert type(plain[0]) is nn.Linear


def test_what_cannot_be_split_is_not() -> None:
    assert ways_for([layer(outer=127)], 2).parts == 1
    assert ways_for([layer()], 1).parts == 1
