"""Finding a model by name, and what is said when it cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

from protocol.errors import BrokenCheckpoint, ModelError, NoBlockStack, RemoteCodeRefused, UnknownModel
from protocol.span import Span
from slicing import load_config, load_head, load_span, resolve
from slicing.checkpoint import INDEX, StoredTensor, read_header, read_tensor, stored_tensors, weight_map


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama, to be damaged."""
    copy = tmp_path / "damaged"
    shutil.copytree(checkpoint("llama"), copy)
    return copy


def load(folder: Path, span: str = "0:6") -> None:
    load_span(resolve(str(folder)), Span.parse(span))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / weight_map(resolve(str(folder)))[tensor]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_is_found_wherever_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = resolve("damaged")
    assert found.name == "damaged"
    assert found.location == str(folder)
    assert found.revision is None


def test_the_embedded_model_is_found_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicing.source.EMBEDDED", folder.parent)
    with pytest.raises(UnknownModel, match="lacks the embedded model"):
        resolve("potluck-demo")
    folder.rename(folder.parent / "potluck-demo")
    assert resolve("potluck-demo").location == str(folder.parent / "potluck-demo")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "~nobody/x", "../x", "a b"])
def test_what_is_neither_folder_nor_hub_id_is_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel):
        resolve(name or str(tmp_path / "absent"))


def test_a_folder_without_a_model_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        resolve(str(tmp_path))


def test_code_that_came_with_weights_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="homemade", auto_map={"AutoModelForCausalLM": "modeling_homemade.Homemade"})
    with pytest.raises(RemoteCodeRefused, match=r"trust_remote_code.*never runs such code"):
        load(folder)


def test_a_native_class_is_used_even_where_code_came_along(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Evil"})
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    load(folder)


def test_an_architecture_of_the_future_is_said_to_be_unknown(folder: Path) -> None:
    edit_config(folder, model_type="llama99")
    with pytest.raises(ModelError, match="llama99"):
        load(folder)


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="quantised"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_damaged_config_is_named(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(BrokenCheckpoint, match=r"config\.json"):
        load(folder)


def test_a_config_with_nonsense_in_it_is_named(folder: Path) -> None:
    edit_config(folder, num_attention_heads="many")
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder)


def test_an_encoder_has_no_block_stack(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    for attempt in (lambda: load(tmp_path, "0:2"), lambda: load_head(resolve(str(tmp_path)))):
        with pytest.raises(NoBlockStack, match="bert"):
            attempt()


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = shard_of(folder, "model.layers.3.mlp.up_proj.weight")
    shard.unlink()
    with pytest.raises(BrokenCheckpoint, match=shard.name):
        load(folder)
    load(folder, "0:1")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_a_truncated_shard_is_named(kept: float, folder: Path) -> None:
    shard = shard_of(folder, "model.layers.3.mlp.up_proj.weight")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(BrokenCheckpoint, match=rf"{shard.name}.*truncated"):
        load(folder)


def test_a_shard_with_too_much_in_it_is_named(folder: Path) -> None:
    shard = shard_of(folder, "model.layers.3.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes() + b"\0" * 8)
    with pytest.raises(BrokenCheckpoint, match=rf"{shard.name}.*too long"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'],
)
def test_a_nonsensical_header_is_named(header: bytes, folder: Path) -> None:
    shard = shard_of(folder, "model.layers.3.mlp.up_proj.weight")
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BrokenCheckpoint, match=shard.name):
        load(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    shard = shard_of(folder, name)
    save_file({k: v for k, v in load_file(shard).items() if k != name}, shard)
    with pytest.raises(BrokenCheckpoint, match=f"{shard.name} lacks the tensor {name}"):
        load(folder)


def test_a_tensor_that_no_file_holds_is_named(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=name):
        load(folder)
    load(folder, "0:3")


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    shard = shard_of(folder, name)
    save_file({k: v[:5].clone() if k == name else v for k, v in load_file(shard).items()}, shard)
    with pytest.raises(BrokenCheckpoint, match=r"do not fit its config\.json"):
        load(folder)


def test_a_file_that_ends_while_it_is_read_is_named(folder: Path) -> None:
    shard = shard_of(folder, "model.layers.3.mlp.up_proj.weight")
    stored = read_header(shard)["model.layers.3.mlp.up_proj.weight"]
    shard.write_bytes(shard.read_bytes()[: stored.offset + 10])
    with pytest.raises(BrokenCheckpoint, match=rf"{shard.name} ended within"):
        read_tensor(shard, stored)


def test_what_fails_in_a_thread_of_the_loader_is_told_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, stored: StoredTensor) -> torch.Tensor:
        raise BrokenCheckpoint("the disk is on fire")

    monkeypatch.setattr("slicing.loading.read_tensor", fail)
    with pytest.raises(BrokenCheckpoint, match="on fire"):
        load(folder)


def test_pickled_weights_are_refused_with_why(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(BrokenCheckpoint, match="unpickling can run code"):
        load(folder)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../../etc/passwd"}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_a_damaged_index_is_named(index: str, folder: Path) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(BrokenCheckpoint, match=INDEX):
        load(folder)


def test_one_file_needs_no_index(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = {}
    for path in checkpoint("llama").glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    assert stored_tensors(resolve(str(tmp_path))).keys() == tensors.keys()
    load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_come_back_as_they_were_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    saved = {"a": torch.randn(3, 5).to(dtype), "empty": torch.zeros(0, 4).to(dtype), "scalar": torch.ones(()).to(dtype)}
    save_file(saved, path)
    for name, stored in read_header(path).items():
        found = read_tensor(path, stored)
        assert found.shape == saved[name].shape
        assert found.dtype == dtype
        assert torch.equal(found.to(torch.float64), saved[name].to(torch.float64))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(BrokenCheckpoint, match="F4"):
        read_tensor(tmp_path / "x.safetensors", StoredTensor("a", "F4", (4,), 0, 2))


def test_the_name_of_the_model_is_what_the_user_wrote(folder: Path) -> None:
    assert load_config(resolve(str(folder))).name_or_path == str(folder)
    assert load_head(resolve(str(folder))).config.name_or_path == str(folder)
