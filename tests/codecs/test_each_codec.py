"""What only some codecs promise: exactness, error bounds, what becomes of NaN, Inf and the ends of a dtype's range."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.errors import BadPayload
from tensor_codecs import codec, int8
from tensor_codecs.blockwise8 import block_size
from tests.codecs.strategies import FLOATS, INTEGERS, error, heavy, rows, same, seeded

NAN, INF = float("nan"), float("inf")


def round_trip(name: str, x: torch.Tensor) -> torch.Tensor:
    return codec(name).decode(codec(name).encode(x), x.shape, x.dtype)


# ---- none


@given(st.binary(min_size=8, max_size=64), st.sampled_from([*FLOATS, *INTEGERS]))
def test_none_keeps_every_bit_pattern(raw: bytes, dtype: torch.dtype) -> None:
    raw = raw[: len(raw) // 8 * 8]
    x = codec("none").decode(raw, (len(raw) // dtype.itemsize,), dtype)
    assert codec("none").encode(x) == raw


def test_none_is_little_endian() -> None:
    assert codec("none").encode(torch.tensor([1.5, -2.0])) == struct.pack("<2f", 1.5, -2.0)


def test_none_bool() -> None:
    x = torch.tensor([True, False, True])
    assert codec("none").encode(x) == b"\1\0\1"
    assert torch.equal(codec("none").decode(b"\2\0\xff", (3,), torch.bool), x)
    assert codec("none").encode(codec("none").decode(b"\2\0\xff", (3,), torch.bool)) == b"\1\0\1"


# ---- fp16, bf16


@given(rows())
def test_casts_are_casts(x: torch.Tensor) -> None:
    assert same(round_trip("fp16", x), x.to(torch.float16).to(x.dtype))
    assert same(round_trip("bf16", x), x.to(torch.bfloat16).to(x.dtype))


def test_fp16_overflows_to_infinity() -> None:
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e6, INF, NAN, 1e-9])
    want = torch.tensor([65504.0, 65504.0, INF, -INF, INF, NAN, 0.0])
    assert torch.equal(round_trip("fp16", x).nan_to_num(1), want.nan_to_num(1))
    assert round_trip("fp16", x)[5].isnan()


def test_bf16_keeps_range_nan_and_inf() -> None:
    x = torch.tensor([65520.0, 3e38, -INF, NAN, 1e-38])
    y = round_trip("bf16", x)
    assert y[2] == -INF
    assert y[3].isnan()
    assert error(y[:2], x[:2]) < 4e-3
    assert y[4] == pytest.approx(1e-38, rel=4e-3)


# ---- int8: error


@given(
    st.integers(0, 2**32), st.sampled_from([64, 100, 768, 4096, 5120]), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_int8_error_on_gaussian_rows(seed: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(16, width, generator=seeded(seed)).to(dtype)
    assert error(round_trip("int8", x), x) <= 0.0065


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([2048, 4096, 4100, 8192]))
def test_int8_error_on_the_inliers_of_outlier_heavy_rows(seed: int, width: int) -> None:
    x, inlier = heavy(16, width, seed)
    # 1 of 20,000 draws of 6 channels has 4 of them in one of 64 blocks, and then one of the 4 is not taken out.
    assume((torch.nonzero(~inlier[0]).flatten() // int8.BLOCK).bincount().max() <= 3)
    y = round_trip("int8", x)
    assert error(y[inlier], x[inlier]) <= 0.0065
    assert error(y, x) <= 0.0065


@given(rows(dtypes=(torch.float32,)))
def test_int8_error_of_each_value_is_half_a_step_of_its_block(x: torch.Tensor) -> None:
    y = round_trip("int8", x)
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % int8.BLOCK)).unflatten(1, (-1, int8.BLOCK))
    step = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, : x.shape[1]] / 127
    assert ((y - x).abs() <= 0.5 * step * 1.01 + 1e-36).all()


def test_int8_keeps_outliers_exactly() -> None:
    for dtype in FLOATS:
        x = torch.randn(2, 4096, generator=seeded(4)).to(dtype)
        for row, column in ((0, 5), (0, 6), (0, 7), (0, 4095), (1, 640), (1, 700)):
            x[row, column] = (column + 1000.5) * (-1) ** column
        y = round_trip("int8", x)
        large = x.abs() > 500
        assert torch.equal(y[large], x[large])
        assert error(y[~large], x[~large]) <= 0.0065


def test_int8_outliers_beyond_float16() -> None:
    x = torch.randn(1, 4096, generator=seeded(5))
    x[0, 17], x[0, 3000] = 3.0e38, -70000.0
    y = round_trip("int8", x)
    assert torch.equal(y[0, [17, 3000]], x[0, [17, 3000]])
    x[0, [17, 3000]] = y[0, [17, 3000]] = 0
    assert error(y, x) <= 0.0065


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("exponent", [-40, -37, -20, -4, 0, 4, 20, 37])
def test_int8_at_any_scale(dtype: torch.dtype, exponent: int) -> None:
    x = (torch.rand(4, 256, generator=seeded(6), dtype=torch.float64) * 2 - 1) * 10.0**exponent
    x = x.to(dtype)
    if x.isinf().any():
        pytest.skip("beyond this dtype")
    y = round_trip("int8", x)
    assert y.isfinite().all()
    half_a_step = 1 / 254 + torch.finfo(dtype).eps / 2
    assert (y.double() - x.double()).abs().max() <= x.double().abs().max() * half_a_step + 1e-36


def test_int8_of_the_largest_float16() -> None:
    x = torch.full((1, 640), 65504.0, dtype=torch.float16)
    x[0, ::2] *= -1
    assert error(round_trip("int8", x), x) < 0.005


# ---- int8: NaN and Inf


@given(rows(dtypes=FLOATS), st.data())
def test_int8_never_makes_a_number_of_nan_or_inf(x: torch.Tensor, data: st.DataObject) -> None:
    generator = seeded(data.draw(st.integers(0, 2**32)))
    share = data.draw(st.sampled_from([0.005, 0.1, 1.0]))
    bad = torch.rand(x.shape, generator=generator) < share
    value = data.draw(st.sampled_from([NAN, INF, -INF]))
    x = torch.where(bad, torch.tensor(value, dtype=x.dtype), x)
    y = round_trip("int8", x)
    kept = (y == x) | (y.isnan() & x.isnan())
    assert (kept | y.isnan())[bad].all()
    # and the damage ends with the block
    in_bad_block = torch.nn.functional.pad(bad, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64)).any(-1)
    spoiled = in_bad_block.repeat_interleave(64, 1)[:, : x.shape[1]]
    assert y[~spoiled].isfinite().all()


def test_int8_keeps_few_nan_and_inf_exactly() -> None:
    x = torch.randn(1, 4096, generator=seeded(7))
    x[0, [3, 4, 5, 900]] = torch.tensor([NAN, INF, -INF, NAN])
    y = round_trip("int8", x)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.isinf() * y.sign().nan_to_num(), x.isinf() * x.sign().nan_to_num())
    assert error(y.nan_to_num(0, 0, 0), x.nan_to_num(0, 0, 0)) <= 0.0065


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_int8_a_block_with_too_many_becomes_nan(value: float) -> None:
    x = torch.randn(1, 4096, generator=seeded(8))
    x[0, 64:68] = value
    y = round_trip("int8", x)
    assert not y[0, 64:128].isfinite().any()
    assert y[0, :64].isfinite().all()
    assert y[0, 128:].isfinite().all()


# ---- int8: layout


def test_int8_bytes_per_value() -> None:
    for width, dtype, most in (
        (4096, torch.float32, 1.067),
        (4096, torch.bfloat16, 1.055),
        (8192, torch.float32, 1.067),
        (2048, torch.bfloat16, 1.08),
        (1024, torch.bfloat16, 1.13),
    ):
        assert codec("int8").nbytes((1, width), dtype) / width <= most


@given(
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 3, 64, 70, 2048, 40_000]),
    slot=st.integers(0, 2),
    high=st.booleans(),
)
def test_int8_an_outlier_outside_of_its_row_is_refused(rows: int, width: int, slot: int, high: bool) -> None:
    x = torch.randn(rows, width)
    index_size, code = (2, "<h") if width <= 2**15 else (4, "<i")
    start = (rows - 1) * codec("int8").nbytes((width,), x.dtype) + width + 2 * -(-width // 64)
    payload = bytearray(codec("int8").encode(x))
    struct.pack_into(code, payload, start + slot * index_size, width if high else -1)
    with pytest.raises(BadPayload, match="outside of its row"):
        codec("int8").decode(payload, x.shape, x.dtype)
    with pytest.raises(BadPayload, match="outside of its row"):  # what is asked before bytes go to a GPU
        codec("int8")._check_rows(torch.frombuffer(payload, dtype=torch.uint8).view(rows, -1), width, x.dtype)


@given(rows(dtypes=(torch.float32,), max_rows=5))
def test_int8_both_ways_to_find_outliers_agree(x: torch.Tensor) -> None:
    """The one with torch, meant for GPUs, against the one with numpy: the same values, the same peaks."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, 64)).contiguous()
    keys = x.view(torch.int32) & int8._KEY
    peaks = [keys.amax(-1), keys.amax(-1)]
    homes = min(keys.shape[1], 8)
    found = [
        find(keys, peak, homes).sort(-1).values
        for find, peak in zip((int8._take_outliers_torch, int8._take_outliers_numpy), peaks, strict=True)
    ]
    magnitudes = [x.abs().flatten(1).gather(1, places).sort(-1).values for places in found]
    assert torch.allclose(magnitudes[0], magnitudes[1], rtol=2**-16)
    assert torch.allclose(
        peaks[0].view(torch.float32).sort(-1).values, peaks[1].view(torch.float32).sort(-1).values, rtol=2**-16
    )
    for places, peak in zip(found, peaks, strict=True):
        left = x.abs().flatten(1).scatter(1, places, 0.0).unflatten(1, (-1, 64)).amax(-1)
        assert torch.allclose(peak.view(torch.float32), left, rtol=2**-16, atol=1e-37)


# ---- blockwise8


def test_blockwise8_blocks_never_leave_their_row() -> None:
    assert [block_size(w) for w in (4096, 8192, 5120, 768, 64, 100, 1)] == [4096, 4096, 1024, 256, 64, 64, 64]
    x = torch.randn(2, 4096, generator=seeded(9))
    x[0] *= 1000
    assert error(round_trip("blockwise8", x)[1], x[1]) <= 0.02


def test_blockwise8_is_bitsandbytes() -> None:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    x = torch.randn(3, 1024, generator=seeded(10))
    levels, state = quantize_blockwise(x, blocksize=1024)
    assert same(round_trip("blockwise8", x), dequantize_blockwise(levels, state))


@given(rows(), st.sampled_from([NAN, INF, -INF]))
def test_blockwise8_a_block_with_nan_or_inf_becomes_nan(x: torch.Tensor, value: float) -> None:
    x[0, 0] = value
    y = round_trip("blockwise8", x)
    size = block_size(x.shape[1])
    assert y[0, :size].isnan().all()
    assert y[0, size:].isfinite().all()
    assert y[1:].isfinite().all()
