"""What a checkpoint holds, read from safetensors headers, and single tensors read from it.

A tensor is read into memory of its own (**resident, not mapped**): a peer's memory is declared, so it must be there at
the first step and not fault in during it, a file that shrinks under a mapping would kill the process with SIGBUS, and
a hub cache may be cleaned while a peer serves. The price, no sharing between two processes that serve the same blocks,
is one that peers of a swarm do not pay. Each tensor keeps the **alignment** that it has in its file: vectorised kernels
round differently for addresses that are 8 and 16 modulo 16, and a model that transformers maps from that file
must give the same bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from protocol.errors import BrokenCheckpoint
from slicing import hub

if TYPE_CHECKING:
    import torch

    from slicing.source import ModelSource

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_MOST = 2**48  # of any number: products of a few stay numbers that torch takes
_ALIGNMENT = 64  # a cache line: no kernel looks further


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Attributes:
        dtype: as safetensors writes it, e.g. "BF16".
        offset: where its bytes begin, from the start of the file.
        nbytes: how many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def weight_map(source: ModelSource) -> dict[str, str]:
    """Which file holds which tensor: {tensor name: file name}. A checkpoint in one file is downloaded to tell.

    Raises:
        BrokenCheckpoint: there are no safetensors files, or the index is malformed.
    """
    index = source.find(INDEX)
    if index is not None:
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BrokenCheckpoint(f"{INDEX} of {source.name!r} is malformed: {error!r}") from error
        # A name with a folder in it could point out of the model.
        if not isinstance(entries, dict) or not all(
            isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard
            for shard in entries.values()
        ):
            raise BrokenCheckpoint(f"{INDEX} of {source.name!r} does not map tensors to .safetensors files beside it")
        return entries
    single = source.find(SINGLE)
    if single is None:
        raise BrokenCheckpoint(
            f"model {source.name!r} has no weights as safetensors (neither {SINGLE} nor {INDEX}); "
            "weights pickled by PyTorch are not read, since unpickling can run code"
        )
    return dict.fromkeys(read_header(single), SINGLE)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; the file is checked to be whole.

    Raises:
        BrokenCheckpoint: it is truncated, longer than its header says, or no safetensors file; the message names it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise BrokenCheckpoint(f"{path.name} is truncated or no safetensors file ({size} bytes); download it again")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpoint(f"the header of {path.name} is malformed; download it again") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=8 + length)
    if end != size:
        kind = "truncated" if size < end else "too long"
        raise BrokenCheckpoint(f"{path.name} is {kind}: {size} bytes instead of {end}; download it again")
    return tensors


def stored_tensors(source: ModelSource) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint. Of files that are still at the hub, only the headers are transferred.

    Raises:
        BrokenCheckpoint: a file is missing or not whole, or lacks a tensor that the index names.
    """
    names = weight_map(source)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(names.values())):
        if source.revision is not None and not hub.is_cached(source.location, shard, source.revision):
            header = _remote_header(source.location, shard, source.revision)
        else:
            header = read_header(source.file(shard))
        found |= pick(header, [name for name, where in names.items() if where == shard], shard)
    return found


def pick(header: Mapping[str, StoredTensor], names: list[str], shard: str) -> dict[str, StoredTensor]:
    """The entries of `header` called `names`.

    Raises:
        BrokenCheckpoint: one is not there; the message names it and the shard.
    """
    for name in names:
        if name not in header:
            raise BrokenCheckpoint(f"{shard} lacks the tensor {name} that {INDEX} says it holds; download both again")
    return {name: header[name] for name in names}


def read_tensor(path: Path, stored: StoredTensor) -> torch.Tensor:
    """Read one tensor's bytes, and no others, into resident memory aligned as in the file.

    Returns:
        a CPU tensor of the stored shape and dtype.

    Raises:
        BrokenCheckpoint: the file ends early, or its dtype is one that this torch does not have.
    """
    import torch

    dtype = _torch_dtype(stored, path)
    if math.prod(stored.shape) * dtype.itemsize != stored.nbytes:
        raise BrokenCheckpoint(
            f"the tensor {stored.name} in {path.name} has {stored.nbytes} bytes, not what its shape says"
        )
    buffer = torch.empty(stored.nbytes + _ALIGNMENT, dtype=torch.uint8)
    # A file written out of order can break even the alignment to elements, which torch needs.
    start = (stored.offset - buffer.data_ptr()) % _ALIGNMENT if stored.offset % dtype.itemsize == 0 else 0
    data = buffer[start : start + stored.nbytes]
    into = memoryview(cast(Any, data.numpy()))
    file = os.open(path, os.O_RDONLY)
    try:
        done = 0
        while done < stored.nbytes:
            read = os.preadv(file, [into[done:]], stored.offset + done)
            if read == 0:
                raise BrokenCheckpoint(f"{path.name} ended within the tensor {stored.name}; download it again")
            done += read
    finally:
        os.close(file)
    try:
        return data.view(dtype).view(stored.shape)
    except RuntimeError as error:
        raise BrokenCheckpoint(f"the tensor {stored.name} in {path.name} has a shape that none can have") from error


def _stored(name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and 0 <= number < _MOST for number in (begin, end, *shape)) or end < begin:
        raise ValueError(name)
    return StoredTensor(name, str(entry["dtype"]), shape, data_start + begin, end - begin)


def _remote_header(repo: str, shard: str, revision: str) -> dict[str, StoredTensor]:
    tensors = hub.remote_header(repo, shard, revision).tensors
    return {
        name: _stored(name, {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}, 0)
        for name, info in tensors.items()
    }


def _torch_dtype(stored: StoredTensor, path: Path) -> torch.dtype:
    import torch

    names = {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }
    dtype = getattr(torch, names.get(stored.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise BrokenCheckpoint(f"the tensor {stored.name} in {path.name} has the dtype {stored.dtype}, unknown here")
    return dtype
