"""Models of a hub: only what is needed is fetched, and what goes wrong is said in a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protocol.errors import BrokenCheckpoint, UnknownModel
from protocol.span import Span
from slicing import fingerprint, load_head, load_span, resolve
from slicing.checkpoint import read_header, weight_map
from tests.slicing.architectures import N_BLOCKS
from tests.slicing.chain import LocalChain
from tests.slicing.hub_server import COMMIT, Hub, serve
from tests.slicing.steps import assert_same_bits, logits_of


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the repository org/llama, and an empty cache on this side."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "repo"
    shutil.copytree(checkpoint("llama"), repo)
    with serve(Hub({"org/llama": repo})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def shards(hub: Hub) -> set[str]:
    return {path.name for path in hub.repos["org/llama"].glob("*.safetensors")}


def test_a_model_is_pinned_to_the_commit_that_it_has_now(hub: Hub) -> None:
    found = resolve("org/llama")
    assert (found.name, found.location, found.revision) == ("org/llama", "org/llama", COMMIT)
    assert hub.downloaded() == {"config.json"}


def test_only_the_files_that_hold_the_span_are_downloaded(hub: Hub) -> None:
    heard: list[tuple[int, int, str]] = []
    span = load_span(resolve("org/llama"), Span(1, 3), progress=lambda *event: heard.append(event))
    got = hub.downloaded()
    assert got & shards(hub) == set(span.report.files)
    assert 0 < len(span.report.files) < len(shards(hub)) / 2
    assert got - shards(hub) == {"config.json", "model.safetensors.index.json"}
    downloads = [event for event in heard if event[2].startswith("download of")]
    sizes = sum((hub.repos["org/llama"] / name).stat().st_size for name in span.report.files)
    assert downloads[-1][0] == downloads[-1][1] == sizes
    assert heard[-1][:2] == (span.report.n_bytes, span.report.n_bytes)


def test_what_is_cached_is_not_fetched_again(hub: Hub) -> None:
    load_span(resolve("org/llama"), Span(1, 3))
    hub.requests.clear()
    load_span(resolve("org/llama"), Span(1, 3))
    assert not hub.downloaded()


def test_a_chain_from_a_hub_computes_what_the_unsplit_model_computes(
    hub: Hub, unsplit: Callable[[str], object]
) -> None:
    head = load_head(resolve("org/llama"))
    assert head.generation_config is not None
    assert head.generation_config.eos_token_id == 2
    head.attach(LocalChain.load(resolve("org/llama"), [0, 3, N_BLOCKS]))
    assert_same_bits(logits_of(unsplit("llama"), padded=True), logits_of(head, padded=True))


def test_a_fingerprint_fetches_headers_only_and_is_that_of_the_downloaded_model(hub: Hub, tmp_path: Path) -> None:
    # large enough that a header is a small part of its file
    path = hub.repos["org/llama"] / next(iter(sorted(shards(hub))))
    tensors = load_file(path)
    save_file({name: tensor.repeat(40, *[1] * (tensor.dim() - 1)) for name, tensor in tensors.items()}, path)
    remote = fingerprint(resolve("org/llama"))
    assert path.stat().st_size > 1_000_000
    # huggingface_hub reads the first 100 kB of each file, which hold any usual header
    assert not hub.downloaded(over=200_000)
    for name in shards(hub):
        resolve("org/llama").file(name)
    assert fingerprint(resolve("org/llama")) == remote


def test_one_file_without_an_index(hub: Hub) -> None:
    repo = hub.repos["org/llama"]
    tensors: dict[str, torch.Tensor] = {}
    for path in list(repo.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (repo / "model.safetensors.index.json").unlink()
    save_file(tensors, repo / "model.safetensors")
    span = load_span(resolve("org/llama"), Span(1, 3))
    assert span.report.files == ("model.safetensors",)


def test_a_shard_that_the_hub_lacks_is_named(hub: Hub) -> None:
    missing = weight_map(resolve("org/llama"))["model.layers.3.mlp.up_proj.weight"]
    (hub.repos["org/llama"] / missing).unlink()
    for attempt in (lambda: load_span(resolve("org/llama"), Span(3, 4)), lambda: fingerprint(resolve("org/llama"))):
        with pytest.raises(BrokenCheckpoint, match=missing):
            attempt()


def test_a_cached_shard_that_was_truncated_is_named(hub: Hub) -> None:
    source = resolve("org/llama")
    shard = source.file(sorted(shards(hub))[3])
    assert read_header(shard)
    content = shard.read_bytes()
    shard.resolve().write_bytes(content[:-9])
    with pytest.raises(BrokenCheckpoint, match=shard.name):
        load_span(source, Span(0, N_BLOCKS))


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("org/absent", None, "no hub repository 'org/absent'"),
        ("absent", None, "no hub repository 'absent'"),
        ("org/llama", "v9", "no such revision"),
    ],
)
def test_unknown_names_and_revisions(hub: Hub, name: str, revision: str | None, said: str) -> None:
    with pytest.raises(UnknownModel, match=said):
        resolve(name, revision=revision)


def test_a_gated_model_says_how_to_get_access(hub: Hub) -> None:
    hub.gated.add("org/llama")
    with pytest.raises(UnknownModel, match=r"gated.*hf auth login"):
        resolve("org/llama")


def test_a_repository_without_a_model(hub: Hub) -> None:
    (hub.repos["org/llama"] / "config.json").unlink()
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        resolve("org/llama")


def test_an_unreachable_hub_is_said_to_be_that_and_the_cache_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub.repos["org/llama"] / "generation_config.json").unlink()
    load_span(resolve("org/llama"), Span(1, 3))
    load_head(resolve("org/llama"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve("org/llama").revision == COMMIT
    load_span(resolve("org/llama"), Span(1, 3))
    load_head(resolve("org/llama"))
    with pytest.raises(UnknownModel, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        load_span(resolve("org/llama"), Span(0, N_BLOCKS))
    with pytest.raises(UnknownModel, match=r"hub at http://127\.0\.0\.1:9 cannot be reached"):
        resolve("org/never-seen")
