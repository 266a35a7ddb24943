"""Weights into a holed model: which tensors it needs, their files, and nothing but those read."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from protocol.errors import BrokenCheckpoint
from slicing import hub
from slicing.checkpoint import StoredTensor, pick, read_header, read_tensor, weight_map
from slicing.skeleton import meta_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slicing.source import ModelSource

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Told how far a load has come: `progress(done_bytes, total_bytes, what)`.

    Called from threads of the loader, one call at a time; must return quickly. A load may consist of a download (total:
    bytes of the files) and then a read (total: bytes of the tensors); `what` names which. To stop a load, raise: the
    load then raises the same.
    """

    def __call__(self, done_bytes: int, total_bytes: int, what: str, /) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load read.

    Attributes:
        what: e.g. "blocks 4:12 of org/model".
        n_tensors, n_bytes: tensors read from the checkpoint, and their bytes there.
        files: the files that they came from.
    """

    what: str
    n_tensors: int
    n_bytes: int
    files: tuple[str, ...]

    def plus(self, other: LoadReport) -> LoadReport:
        """What two loads of one part read together."""
        files = tuple(sorted({*self.files, *other.files}))
        return LoadReport(self.what, self.n_tensors + other.n_tensors, self.n_bytes + other.n_bytes, files)

    def __str__(self) -> str:
        return f"{self.what}: {self.n_tensors} tensors, {self.n_bytes / 2**20:.1f} MiB from {len(self.files)} files"


def load(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    source: ModelSource,
    what: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    progress: Progress | None,
) -> tuple[PreTrainedModel, LoadReport]:
    """An instance of the holed class `cls` with its weights, in eval mode.

    Args:
        what: names the part that is loaded, for progress and report.
        dtype: of the floating-point weights; None: as the configuration says, else as stored.

    Raises:
        BrokenCheckpoint: a file is missing or not whole, or a tensor is missing, of another shape, or unreadable.
        MemoryError: there is too little memory, of the machine or of the device.
        UnknownModel: the hub cannot be reached.
    """
    names = weight_map(source)
    needed = needed_tensors(cls, config, list(names))
    shards = sorted({names[name] for name in needed})
    _download(source, shards, progress)
    files: dict[str, Path] = {}
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        path = source.file(shard)
        of_shard = [name for name in needed if names[name] == shard]
        stored |= pick(read_header(path), of_shard, shard)
        files |= dict.fromkeys(of_shard, path)
    reader = _Reader(what, sum(tensor.nbytes for tensor in stored.values()), progress)
    lazy = {name: _LazyTensor(reader, files[name], stored[name]) for name in needed}
    try:
        model = _from_lazy(cls, config, source, lazy, reader, dtype or _own_dtype(config, stored))
        model = cast("PreTrainedModel", model.to(cast(Any, device)))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(f"too little memory for {what}") from error
        raise
    report = LoadReport(what, len(stored), reader.total, tuple(shards))
    logger.info("loaded %s", report)
    return model, report


def is_out_of_memory(error: BaseException) -> bool:
    """Is it the failure to get memory? torch has a class for that on GPUs only; on a CPU its text tells."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def needed_tensors(cls: type[PreTrainedModel], config: PreTrainedConfig, stored: list[str]) -> list[str]:
    """Those of the checkpoint's tensor names that end up in an instance of `cls`: a dry run of transformers' renaming.

    Several stored tensors can become one parameter (experts are fused), and names can differ between file and model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    skeleton = meta_skeleton(cls, copy.deepcopy(config))
    steps = get_model_conversion_mapping(skeleton)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    parameters = skeleton.state_dict()

    def is_needed(name: str) -> bool:
        prefix = skeleton.base_model_prefix
        for by in ((renamings, converters), ([], [])):
            renamed, _ = rename_source_key(name, by[0], by[1], prefix, parameters)
            if renamed in parameters:
                return True
        return False

    return [name for name in stored if is_needed(name)]


class _Reader:
    """Counts what its tensors read, and keeps the first failure: transformers turns those of its threads into text."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.failure: Exception | None = None
        self._progress = progress
        self._lock = threading.Lock()

    def read(self, path: Path, stored: StoredTensor) -> torch.Tensor:
        if self.failure is not None:  # transformers would go on to the end before it says so
            raise self.failure
        try:
            tensor = read_tensor(path, stored)
            with self._lock:
                self.done += stored.nbytes
                if self._progress is not None:
                    self._progress(self.done, self.total, self.what)
        except Exception as error:
            self.failure = self.failure or error
            raise
        return tensor


class _LazyTensor:
    """What transformers takes for a safetensors slice: read when it is indexed with `[...]`, in one piece."""

    def __init__(self, reader: _Reader, path: Path, stored: StoredTensor) -> None:
        self._reader = reader
        self._path = path
        self._stored = stored

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        return self._stored.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._reader.read(self._path, self._stored)[index]


def _from_lazy(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    source: ModelSource,
    lazy: dict[str, _LazyTensor],
    reader: _Reader,
    dtype: torch.dtype,
) -> PreTrainedModel:
    try:
        with _quiet_transformers():
            model, info = cast(Any, cls).from_pretrained(
                None, config=config, state_dict=lazy, dtype=dtype, output_loading_info=True
            )
    except RuntimeError as error:
        if reader.failure is not None:
            raise reader.failure from error
        if is_out_of_memory(error):
            raise
        raise BrokenCheckpoint(f"the weights of {source.name!r} do not fit its config.json: {error}") from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise BrokenCheckpoint(f"the checkpoint of {source.name!r} lacks {', '.join(lacking[:3])}{more}")
    unloaded = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if unloaded:
        raise BrokenCheckpoint(f"the checkpoint of {source.name!r} left {', '.join(unloaded[:3])} without values")
    model.config.name_or_path = source.name
    return cast("PreTrainedModel", model)


def _own_dtype(config: PreTrainedConfig, stored: dict[str, StoredTensor]) -> torch.dtype:
    """The dtype that the configuration names, else that of the first floating-point tensor, else float32."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return next((names[tensor.dtype] for tensor in stored.values() if tensor.dtype in names), torch.float32)


def _download(source: ModelSource, shards: list[str], progress: Progress | None) -> None:
    """Bring the files here that are still at the hub. Progress goes file by file."""
    if source.revision is None:
        return
    absent = [shard for shard in shards if not hub.is_cached(source.location, shard, source.revision)]
    sizes = {shard: hub.size_of(source.location, shard, source.revision) for shard in absent}
    done, total = 0, sum(sizes.values())
    for shard in absent:
        if progress is not None:
            progress(done, total, f"download of {shard}")
        source.file(shard)
        done += sizes[shard]
        if progress is not None:
            progress(done, total, f"download of {shard}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bar and report, for as long as it loads: `Progress` and errors say it."""
    from transformers.utils import logging as transformers_logging

    def no_bar(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    loading = logging.getLogger("transformers.modeling_utils")
    previous = transformers_logging.set_tqdm_hook(no_bar)
    loading.addFilter(_reject)
    try:
        yield
    finally:
        loading.removeFilter(_reject)
        transformers_logging.set_tqdm_hook(previous)


def _reject(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
