"""What holds for every codec: round trips, static sizes, row-locality, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadPayload
from tensor_codecs import codec, dtype_name, dtype_of, names
from tests.codecs.strategies import FLOATS, INTEGERS, error, rows, same, seeded, shapes

ALL = ("int8", "bf16", "fp16", "blockwise8", "none")
each_codec = pytest.mark.parametrize("name", ALL)
# The most that a codec may lose on Gaussian values; `none` nothing.
MOST = {"none": 0.0, "fp16": 5e-4, "bf16": 3e-3, "int8": 0.0065, "blockwise8": 0.025}


def round_trip(name: str, x: torch.Tensor) -> torch.Tensor:
    return codec(name).decode(codec(name).encode(x), x.shape, x.dtype)


def test_this_file_knows_all_codecs() -> None:
    assert set(ALL) == set(names())


@each_codec
@given(shape=shapes, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**32))
def test_round_trip_of_any_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(shape, generator=seeded(seed)).to(dtype)
    payload = codec(name).encode(x)
    assert type(payload) is bytes
    assert len(payload) == codec(name).nbytes(x.shape, dtype) == codec(name).nbytes(list(shape), dtype)
    y = codec(name).decode(payload, shape, dtype)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "cpu")
    assert y.is_contiguous()
    if x.numel() >= 64:
        cast = 2 * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.004
        assert error(y, x) <= MOST[name] + (cast if name != "none" else 0)


@each_codec
@given(x=rows(max_rows=3), seed=st.integers(0, 2**32))
def test_strides_do_not_matter(name: str, x: torch.Tensor, seed: int) -> None:
    wide = torch.randn(*x.shape, 2, generator=seeded(seed)).to(x.dtype)
    wide[..., 1] = x
    strided = wide[..., 1]
    assert codec(name).encode(strided) == codec(name).encode(x)
    assert codec(name).encode(x.t().contiguous().t()) == codec(name).encode(x)
    assert codec(name).encode(x[:1].expand(3, -1)) == codec(name).encode(x[:1]) * 3


@each_codec
@given(x=rows(max_rows=6), data=st.data())
def test_a_row_depends_on_itself_alone(name: str, x: torch.Tensor, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(x)))
    a, b = x[:cut], x[cut:]
    assert codec(name).encode(x) == codec(name).encode(a) + codec(name).encode(b)
    assert same(round_trip(name, x), torch.cat([round_trip(name, a), round_trip(name, b)]))
    assert same(round_trip(name, x[None]), round_trip(name, x)[None])


@each_codec
def test_a_row_depends_on_itself_alone_in_large_tensors(name: str) -> None:
    x = torch.randn(300, 4096, generator=seeded(0))  # beyond what int8 packs at once, and enough for several threads
    x[7, 9], x[150, 64:80] = float("nan"), float("inf")
    c = codec(name)
    whole = c.encode(x)
    size = c.nbytes((4096,), x.dtype)
    y = c.decode(whole, x.shape, x.dtype)
    for i in (0, 7, 127, 128, 150, 299):
        row = whole[i * size : (i + 1) * size]
        assert row == c.encode(x[i])
        assert same(c.decode(row, x[i].shape, x.dtype), y[i])


@each_codec
@given(x=rows())
def test_the_same_tensor_gives_the_same_bytes(name: str, x: torch.Tensor) -> None:
    before = x.clone()
    assert codec(name).encode(x) == codec(name).encode(x.clone())
    assert same(x, before), "encode wrote into its input"


@pytest.mark.parametrize("name", ["none", "fp16", "bf16"])
@given(x=rows())
def test_decoding_again_changes_nothing_more(name: str, x: torch.Tensor) -> None:
    once = round_trip(name, x)
    assert same(round_trip(name, once), once)


@each_codec
def test_zeros_stay_zeros(name: str) -> None:
    for width in (1, 64, 100, 4096):
        assert torch.equal(round_trip(name, torch.zeros(3, width)), torch.zeros(3, width))


@each_codec
def test_the_result_has_memory_of_its_own(name: str) -> None:
    x = torch.randn(2, 64, generator=seeded(1)).to(torch.float16)
    payload = bytearray(codec(name).encode(x))
    y = codec(name).decode(memoryview(payload), x.shape, x.dtype)
    want = y.clone()
    payload[:] = bytes(len(payload))
    assert same(y, want)
    y.zero_()


@each_codec
def test_payloads_may_lie_anywhere_in_a_message(name: str) -> None:
    x = torch.randn(3, 70, generator=seeded(2))
    payload = codec(name).encode(x)
    for offset in range(5):
        message = memoryview(bytes(offset) + payload)
        assert same(codec(name).decode(message[offset:], x.shape, x.dtype), round_trip(name, x))


@each_codec
def test_tensors_of_an_autograd_graph(name: str) -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = round_trip(name, x * 1)
    assert not y.requires_grad
    w = torch.ones(64, requires_grad=True)
    (y * w).sum().backward()  # what was decoded can be saved for a backward pass
    assert w.grad is not None
    with torch.inference_mode():
        assert codec(name).encode(x) == codec(name).encode(x.detach())


@each_codec
@given(x=rows(), change=st.integers(-5, 5).filter(bool))
def test_a_wrong_size_is_refused(name: str, x: torch.Tensor, change: int) -> None:
    payload = codec(name).encode(x)
    wrong = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(BadPayload, match="expected"):
        codec(name).decode(wrong, x.shape, x.dtype)


@each_codec
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(FLOATS))
def test_any_bytes_decode_or_are_refused(
    name: str, data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = seeded(data.draw(st.integers(0, 2**32)))
    size = codec(name).nbytes(shape, dtype)
    payload = bytes(torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).tolist())
    try:
        y = codec(name).decode(payload, shape, dtype)
    except BadPayload:
        assert name == "int8"
    else:
        assert (y.shape, y.dtype) == (torch.Size(shape), dtype)


@each_codec
@pytest.mark.parametrize(
    "shape",
    [
        (-1,),
        (2, -3),
        (-2, -3),
        (2**40, 2**40),
        (0, 2**63),
        (2**62, 0, 4),
        (2**63,),
        (1,) * 17,
        (2.0,),
        ("3",),
        (True, 4),
        (None,),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    for attempt in (
        lambda: codec(name).nbytes(shape, torch.float32),
        lambda: codec(name).decode(b"", shape, torch.float32),
    ):
        with pytest.raises(BadPayload):
            attempt()


@each_codec
def test_a_huge_claim_takes_no_memory(name: str) -> None:
    with pytest.raises(BadPayload, match="expected"):
        codec(name).decode(b"abc", (2**25, 2**20), torch.float32)


@each_codec
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16], ids=str)
def test_dtypes_that_do_not_cross_the_wire(name: str, dtype: torch.dtype) -> None:
    for attempt in (
        lambda: codec(name).nbytes((1,), dtype),
        lambda: codec(name).decode(b"\0", (1,), dtype),
        lambda: codec(name).encode(torch.zeros(1, dtype=dtype)),
        lambda: dtype_name(dtype),
    ):
        with pytest.raises(BadPayload):
            attempt()


@pytest.mark.parametrize("name", [name for name in ALL if name != "none"])
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_lossy_codecs_refuse_integers(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(BadPayload, match="takes"):
        codec(name).encode(torch.zeros(4, dtype=dtype))
    with pytest.raises(BadPayload, match="takes"):
        codec(name).decode(bytes(4), (4,), dtype)


def test_dtype_names() -> None:
    for dtype in (*FLOATS, *INTEGERS, torch.bool):
        assert dtype_of(dtype_name(dtype)) is dtype
    assert dtype_name(torch.bfloat16) == "bfloat16"
    for unknown in ("", "float8", "torch.float32", "Float32", 3, None, []):
        with pytest.raises(BadPayload):
            dtype_of(unknown)  # type: ignore[arg-type]
    with pytest.raises(BadPayload):
        dtype_name("float32")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_codec
def test_cuda(name: str) -> None:
    x = torch.randn(5, 3, 300, generator=seeded(3)).cuda()
    payload = codec(name).encode(x)
    assert len(payload) == codec(name).nbytes(x.shape, x.dtype)
    y = codec(name).decode(payload, x.shape, x.dtype, device="cuda")
    assert y.is_cuda
    assert error(y.cpu(), x.cpu()) <= MOST[name] + 1e-3
    assert same(y.cpu(), codec(name).decode(payload, x.shape, x.dtype))
