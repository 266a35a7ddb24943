"""SpanModel: what it loads, what it refuses, gradients, dtypes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.errors import BadMessage, IllegalCut
from protocol.span import Span
from slicing import ModelSource, block_digests, load_config, load_head, load_span, model_class, resolve
from slicing import checkpoint as checkpoint_module
from slicing.checkpoint import StoredTensor, weight_map
from tests.slicing.architectures import N_BLOCKS
from tests.slicing.chain import LocalChain
from tests.slicing.steps import assert_same_bits, logits_of


def test_only_the_tensors_of_the_span_are_read(source: Callable[[str], ModelSource], read: list[StoredTensor]) -> None:
    span = load_span(source("llama"), Span(2, 4))
    names = {stored.name for stored in read}
    assert names == {n for n in weight_map(source("llama")) if n.startswith(("model.layers.2.", "model.layers.3."))} | {
        "model.norm.weight"
    }
    assert span.report.n_tensors == len(read)
    assert span.report.n_bytes == sum(stored.nbytes for stored in read)
    assert sum(p.nbytes for p in span.model.parameters()) == span.report.n_bytes
    assert span.nbytes() - span.report.n_bytes < 1000  # rotary frequencies
    assert "blocks 2:4" in str(span.report)
    read.clear()
    head = load_head(source("llama"))
    assert {stored.name for stored in read} == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert head.report.n_bytes == sum(stored.nbytes for stored in read)


def test_experts_that_are_fused_while_loading_are_read_once_and_only_those_of_the_span(
    source: Callable[[str], ModelSource],
) -> None:
    span = load_span(source("qwen3_moe"), Span(2, 4))
    assert span.report.n_bytes == sum(p.nbytes for p in span.model.parameters())
    assert span.report.n_tensors > len(list(span.model.parameters()))


def test_files_without_tensors_of_the_span_are_not_needed(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), folder)
    needed = load_span(resolve(str(folder)), Span(0, 2)).report.files
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert load_span(resolve(str(folder)), Span(0, 2)).report.files == needed
    assert len(needed) < len(list(checkpoint("llama").glob("*.safetensors")))


def test_progress_goes_up_to_the_whole(source: Callable[[str], ModelSource]) -> None:
    heard: list[tuple[int, int, str]] = []
    span = load_span(source("llama"), Span(1, 3), progress=lambda *event: heard.append(event))
    done = [event[0] for event in heard]
    assert done == sorted(done)
    assert len(done) == span.report.n_tensors
    assert heard[-1] == (span.report.n_bytes, span.report.n_bytes, f"blocks 1:3 of {source('llama').name}")


def test_weights_are_resident_and_aligned_as_in_their_file(source: Callable[[str], ModelSource]) -> None:
    folder = Path(source("llama").location)
    offsets: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        offsets |= {name: stored.offset for name, stored in checkpoint_module.read_header(path).items()}
    span = load_span(source("llama"), Span(0, N_BLOCKS))
    for name, parameter in span.model.named_parameters():
        assert parameter.data_ptr() % 64 == offsets[name] % 64, name
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(folder) not in mapped.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3_moe", "jamba", "mamba2"])
def test_in_another_dtype(name: str, source: Callable[[str], ModelSource]) -> None:
    found = source(name)
    cls: Any = model_class(load_config(found))
    whole = cls.from_pretrained(found.location, dtype=torch.bfloat16).eval()
    hops = [(load_span(found, span, dtype=torch.bfloat16), span) for span in (Span(0, 2), Span(2, N_BLOCKS))]
    head = load_head(found, dtype=torch.bfloat16)
    head.attach(LocalChain(hops))
    assert hops[0][0].dtype == torch.bfloat16
    assert_same_bits(logits_of(whole, padded=True), logits_of(head, padded=True))


def test_without_a_cache(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("qwen3"), Span(1, 4))
    hidden = torch.randn(2, 7, 64)
    assert torch.equal(model.step(hidden), model.step(hidden, model.new_cache()))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    assert not torch.equal(model.step(hidden), model.step(hidden, attention_mask=mask))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3_moe", "bloom"])
def test_gradients_of_the_hidden_states_are_those_of_the_unsplit_model(
    name: str, source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]
) -> None:
    whole, head = unsplit(name), load_head(source(name))
    first, last = load_span(source(name), Span(0, 2)), load_span(source(name), Span(2, N_BLOCKS))

    class Recording(LocalChain):
        def run(self, hidden: torch.Tensor, **given: Any) -> torch.Tensor:
            assert given["cache"] is None
            return last.step(first.step(hidden, grad=True), grad=True)

    head.attach(Recording([]))
    embeddings = whole.get_input_embeddings()(torch.arange(3, 15)[None]).detach()
    gradients = []
    for model in (whole, head):
        inputs = embeddings.clone().requires_grad_(True)
        loss = model(inputs_embeds=inputs, use_cache=False).logits.square().mean()
        gradients += torch.autograd.grad(loss, inputs)
    assert torch.equal(gradients[0], gradients[1])


HIDDEN = torch.zeros(2, 3, 64)
BAD_STEPS: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
    "too narrow": (torch.zeros(2, 3, 63), {}),
    "no rows": (torch.zeros(0, 3, 64), {}),
    "no tokens": (torch.zeros(2, 0, 64), {}),
    "two dimensions": (torch.zeros(3, 64), {}),
    "four dimensions": (torch.zeros(1, 2, 3, 64), {}),
    "other dtype": (HIDDEN.to(torch.float16), {}),
    "whole numbers": (HIDDEN.to(torch.long), {}),
    "other number of rows": (torch.zeros(1, 3, 64), {}),
    "short mask": (HIDDEN, {"attention_mask": torch.ones(2, 3)}),
    "mask of 4 dimensions": (HIDDEN, {"attention_mask": torch.ones(2, 1, 3, 8)}),
    "mask of fractions": (HIDDEN, {"attention_mask": torch.ones(2, 8)}),
    "short positions": (HIDDEN, {"position_ids": torch.zeros(2, 2, dtype=torch.long)}),
    "positions of 1 dimension": (HIDDEN, {"position_ids": torch.zeros(3, dtype=torch.long)}),
    "positions of other rows": (HIDDEN, {"position_ids": torch.zeros(3, 3, dtype=torch.long)}),
    "fractional positions": (HIDDEN, {"position_ids": torch.zeros(2, 3)}),
    "positions past the table": (HIDDEN, {"position_ids": torch.full((2, 3), 128)}),
    "positions before the table": (HIDDEN, {"position_ids": torch.full((2, 3), -1)}),
    "unknown extras": (HIDDEN, {"extras": {"per_layer_inputs": torch.zeros(2, 3, 6, 8)}}),
    "blocks that are not loaded": (HIDDEN, {"span": Span(0, 3)}),
    "blocks that are not the cache's": (HIDDEN, {"span": Span(2, 4)}),
    "gradients through a cache": (HIDDEN, {"grad": True}),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_bad_step_is_refused_and_touches_nothing(case: str, source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("gpt2"), Span(1, 4))
    cache = model.new_cache()
    model.step(torch.zeros(2, 5, 64), cache)
    hidden, arguments = BAD_STEPS[case]
    with pytest.raises(BadMessage):
        model.step(hidden, cache, **arguments)
    assert cache.n_tokens == 5
    model.step(HIDDEN, cache)
    assert cache.n_tokens == 8


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_session_cannot_outgrow_a_table_of_positions(name: str, source: Callable[[str], ModelSource]) -> None:
    model = load_span(source(name), Span(0, 1))
    cache = model.new_cache()
    model.step(torch.zeros(1, 127, 64), cache)
    model.step(torch.zeros(1, 1, 64), cache)
    with pytest.raises(BadMessage, match="128"):
        model.step(torch.zeros(1, 1, 64), cache)


def test_an_architecture_with_extras_insists_on_them(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("gemma3n"), Span(0, 1))
    assert model.extras == {"per_layer_inputs"}
    hidden = torch.randn(4, 2, 3, 64)
    assert model.step(hidden, extras={"per_layer_inputs": torch.randn(2, 3, 6, 8)}).shape == hidden.shape
    for extras in (
        {},
        {"per_layer_inputs": torch.randn(2, 3, 6, 9)},
        {"per_layer_inputs": torch.randn(2, 4, 6, 8)},
        {"per_layer_inputs": torch.randn(2, 3, 6, 8), "more": torch.zeros(1)},
    ):
        with pytest.raises(BadMessage):
            model.step(hidden, extras=extras)


def test_hidden_states_may_lie_anywhere_in_memory(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("llama"), Span(0, 3))
    hidden = torch.randn(1, 1, 64)
    buffer = torch.zeros(66)
    buffer[1:65] = hidden.flatten()
    assert torch.equal(model.step(buffer[1:65].view(1, 1, 64)), model.step(hidden))


def test_illegal_cuts_are_refused_before_anything_is_read(
    source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slicing.loading.read_tensor", None)
    with pytest.raises(IllegalCut) as refused:
        load_span(source("gemma3n"), Span(0, 4))
    assert refused.value.nearest == ("0:2", "0:6")


def test_two_models_of_one_architecture_do_not_disturb_each_other(source: Callable[[str], ModelSource]) -> None:
    one, other = load_span(source("llama"), Span(0, 3)), load_span(source("llama"), Span(3, 6))
    hidden = torch.randn(1, 4, 64)
    before = one.step(hidden)
    other.step(hidden)
    assert torch.equal(one.step(hidden), before)
    assert block_digests(one).keys() == {0, 1, 2}
