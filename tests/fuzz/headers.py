"""What comes with a model from the hub or from a friend: safetensors headers, the index of shards, config.json.

Allowed: `ModelError`. A file that is taken can be read, tensor by tensor, without more memory than it has bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from protocol.errors import ModelError
from slicing.checkpoint import INDEX, read_header, read_tensor, weight_map
from slicing.config import read_config
from tests.fuzz.target import Target


@dataclass(frozen=True, slots=True)
class _Folder:
    """What these functions use of a `ModelSource`."""

    path: Path
    name: str = "a model"

    def find(self, name: str) -> Path | None:
        path = self.path / name
        return path if path.exists() else None

    def file(self, name: str) -> Path:
        return self.path / name


@cache
def _folder() -> _Folder:
    """Of this process, in memory where there is such a place."""
    shared = Path("/dev/shm")
    made = tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None)
    _kept.append(made)
    return _Folder(Path(made.name))


_kept: list[tempfile.TemporaryDirectory[str]] = []


def run(data: bytes) -> None:
    """One file: its kind by the first byte."""
    if not data:
        return
    folder = _folder()
    kind, data = data[0] % 4, data[1:]
    try:
        if kind == 0:
            (folder.path / INDEX).write_bytes(data)
            shards = weight_map(folder)  # type: ignore[arg-type]
            assert all("/" not in shard for shard in shards.values())
        elif kind == 1:
            (folder.path / "config.json").write_bytes(data)
            assert isinstance(read_config(folder), dict)  # type: ignore[arg-type]
        else:
            _safetensors(folder.path / "model.safetensors", data if kind == 2 else _whole(data))
    except ModelError:
        return


def _whole(header: bytes) -> bytes:
    """A file with that header, and 64 bytes after it."""
    return len(header).to_bytes(8, "little") + header + bytes(64)


def _safetensors(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for stored in read_header(path).values():
        assert 0 <= stored.offset <= stored.offset + stored.nbytes <= len(data)
        try:
            tensor = read_tensor(path, stored)
        except ModelError:
            continue
        assert tensor.nbytes == stored.nbytes and tuple(tensor.shape) == stored.shape


def seeds() -> list[bytes]:
    """Right files of each kind."""
    tensors = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [20], "data_offsets": [24, 64]},
    }
    header = json.dumps(tensors).encode()
    index = {"metadata": {"total_size": 64}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64}
    return [
        b"\0" + json.dumps(index).encode(),
        b"\1" + json.dumps(config).encode(),
        b"\2" + _whole(header),
        b"\3" + header,
    ]


TARGET = Target("headers", run, seeds, modules=("slicing.checkpoint",), short=2000)
