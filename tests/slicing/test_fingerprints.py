"""Fingerprints: the same for the same files anywhere, another for anything that shapes the computation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.span import Span
from slicing import ModelSource, block_digests, fingerprint, load_span, resolve
from tests.slicing.architectures import make_checkpoint


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("llama"), tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=7))


def test_it_does_not_depend_on_where_and_by_whom_the_files_were_written(
    folder: Path, source: Callable[[str], ModelSource]
) -> None:
    before = fingerprint(source("llama"))
    assert len(before) == 32
    assert int(before, 16)
    edit_config(
        folder, _name_or_path="/home/someone", transformers_version="4.0", torch_dtype="float16", use_cache=False
    )
    assert fingerprint(resolve(str(folder))) == before


def test_nor_on_how_the_tensors_are_spread_over_files(folder: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "whole", shard_size="1GB")
    assert not list((tmp_path / "whole").glob("*.index.json"))
    assert fingerprint(resolve(str(tmp_path / "whole"))) == fingerprint(resolve(str(folder)))


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"num_key_value_heads": 4}, {"new_field": None}]
)
def test_it_changes_with_what_shapes_the_computation(
    change: dict[str, object], folder: Path, source: Callable[[str], ModelSource]
) -> None:
    edit_config(folder, **change)
    assert fingerprint(resolve(str(folder))) != fingerprint(source("llama"))


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_it_changes_with_the_tensors(change: str, folder: Path, source: Callable[[str], ModelSource]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"]["model.norm.weight"]
    tensors = load_file(shard)
    norm = tensors.pop("model.norm.weight")
    tensors |= {
        "dtype": {"model.norm.weight": norm.to(torch.bfloat16)},
        "shape": {"model.norm.weight": norm[None]},
        "name": {"model.norm.bias": norm},
    }[change]
    del index["weight_map"]["model.norm.weight"]
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, shard)
    assert fingerprint(resolve(str(folder))) != fingerprint(source("llama"))


def test_it_holds_a_hub_revision(source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch) -> None:
    found = source("llama")
    monkeypatch.setattr("slicing.hub.fetch", lambda repo, name, revision: resolve(found.location).find(name))
    monkeypatch.setattr("slicing.hub.is_cached", lambda *args: True)
    one, other = (fingerprint(ModelSource("org/m", "org/m", revision)) for revision in ("1", "2"))
    assert len({one, other, fingerprint(found)}) == 3


def test_weights_that_differ_have_digests_that_differ(source: Callable[[str], ModelSource], tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, seed=1)
    assert fingerprint(resolve(str(tmp_path))) == fingerprint(source("llama"))
    mine = block_digests(load_span(source("llama"), Span(1, 4)))
    assert mine == {i: d for i, d in block_digests(load_span(source("llama"), Span(0, 6))).items() if 1 <= i < 4}
    assert len(set(mine.values())) == 3
    other = block_digests(load_span(resolve(str(tmp_path)), Span(1, 4)))
    assert not set(mine.values()) & set(other.values())


def test_digests_notice_one_bit(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("llama"), Span(1, 3))
    before = block_digests(model)
    weight = next(model.blocks[2].parameters())
    weight.data.view(torch.uint8).flatten()[17] ^= 1
    after = block_digests(model)
    assert after[1] == before[1]
    assert after[2] != before[2]


def test_digests_of_other_dtypes(source: Callable[[str], ModelSource]) -> None:
    digests = [block_digests(load_span(source("llama"), Span(0, 1), dtype=d)) for d in (torch.float32, torch.bfloat16)]
    assert digests[0] != digests[1]
