"""The key-value (and recurrent) state of one session on one peer, and the operations that generation does to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, get_args

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from protocol.errors import BadMessage, ModelError
from protocol.span import Span
from slicing.config import n_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CacheOpKind = Literal["crop", "reorder", "repeat", "select", "reset", "record_past"]
KINDS: frozenset[str] = frozenset(get_args(CacheOpKind))


@dataclass(frozen=True, slots=True)
class CacheOp:
    """One operation on a session's cache, applied on every peer of the chain before the step that it rides on.

    | kind | value | meaning |
    |---|---|---|
    | crop | int | keep that many tokens, the first ones: `n_tokens - r` for transformers' `crop(-r)` |
    | reorder | tuple | row i becomes what row `value[i]` was, for as many rows as there were (beam search) |
    | repeat | int | every row becomes that many equal neighbours |
    | select | tuple | keep these rows, in this order; at most as many as there were |
    | reset | None | forget all tokens |
    | record_past | None | from now on keep what a later crop may need (sliding windows, convolutions) |

    A crop that keeps everything is not void: it ends what `record_past` kept since the last one.
    """

    kind: CacheOpKind
    value: int | tuple[int, ...] | None = None


class SpanCache(DynamicCache):
    """The cache of the blocks of `span`, in the shape of a cache of the whole model.

    The decoder's own code asks any block's layer for lengths and mask sizes. So the list of layers is full length: for
    a block that is not in the span it holds the layer of a block that is, of the same kind; if there is none, a
    stand-in that only counts. Not safe for use by two threads at once.

    Attributes:
        span: the blocks whose state is here.
        n_tokens: tokens seen so far.
        batch: rows, once a step has been made; None before.
    """

    def __init__(self, config: PreTrainedConfig, span: Span) -> None:
        super().__init__(config=config)
        if not self.layers:
            self.layers = [cast(Any, DynamicLayer)() for _ in range(n_blocks(config))]
        # transformers would append layers on demand; ours are all there
        self.layer_class_to_replicate = None
        self.span = span
        self.n_tokens = 0
        self.batch: int | None = None
        self._owned: list[Any] = self.layers[span.start : span.stop]
        for i, layer in enumerate(self.layers):
            if i not in span:
                same = (mine for mine in self._owned if _kind(mine) == _kind(layer))
                self.layers[i] = next(same, None) or _stand_in(layer, self)

    def advance(self, batch: int, tokens: int) -> None:
        """Note that a step of `tokens` tokens in `batch` rows went through the blocks of the span."""
        self.batch = batch
        self.n_tokens += tokens

    def check(self, op: CacheOp) -> None:
        """Raise unless `op` can be applied now. Cheap; touches nothing.

        Raises:
            BadMessage: unknown kind, a value of the wrong type or out of range, or a crop of state that is gone.
        """
        match op.kind, op.value:
            case "crop", bool():
                raise BadMessage("crop needs a number of tokens")
            case "crop", int(kept):
                self._check_crop(kept)
            case (("reorder" | "select"), tuple(rows)):
                self._check_rows(op.kind, rows)
            case "repeat", bool():
                raise BadMessage("repeat needs a number of copies")
            case "repeat", int(copies):
                if copies < 1:
                    raise BadMessage(f"a cache cannot be repeated {copies} times")
            case (("reset" | "record_past"), None):
                pass
            case _:
                raise BadMessage(f"no cache operation {op.kind!r} takes a value of type {type(op.value).__name__}")

    def apply(self, op: CacheOp) -> None:
        """Check `op`, then do it.

        Raises:
            BadMessage: see `check`; the cache is as it was.
        """
        self.check(op)
        # States made under inference mode may only be changed in place under it.
        with torch.inference_mode():
            match op.kind, op.value:
                case "crop", int(kept):
                    self._crop(kept)
                case (("reorder" | "select"), tuple(rows)):
                    self._take_rows(torch.tensor(rows))
                case "repeat", int(copies):
                    self._take_rows(torch.arange(self.batch or 0).repeat_interleave(copies))
                case "reset", _:
                    self._reset()
                case "record_past", _:
                    for layer in self._owned:
                        if hasattr(layer, "activate_past_recording"):
                            layer.activate_past_recording()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """The operations of transformers' caches would meet a layer that stands for several blocks several times."""
        raise TypeError("a SpanCache changes by apply(CacheOp(...)) only")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = reset = activate_past_recording = _refuse

    def nbytes(self) -> int:
        """The memory that the cache holds, in bytes: whole allocations, also where only a part of one is in use."""
        storages: dict[int, int] = {}
        for layer in self._owned:
            for tensor in _tensors(layer):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def _check_crop(self, kept: int) -> None:
        if not 0 <= kept <= self.n_tokens:
            raise BadMessage(f"a cache of {self.n_tokens} tokens cannot be cropped to {kept}")
        removed = self.n_tokens - kept
        if removed and not all(_can_crop(layer, removed) for layer in self._owned):
            raise BadMessage(
                f"{removed} tokens cannot be taken back: this architecture keeps a window or a running state, of which "
                "the past was not recorded"
            )

    def _check_rows(self, kind: str, rows: tuple[int, ...]) -> None:
        batch = self.batch or 0
        if not rows or len(rows) > batch or (kind == "reorder" and len(rows) < batch):
            raise BadMessage(f"{kind} names {len(rows)} rows, the cache has {batch}")
        if not all(type(row) is int and 0 <= row < batch for row in rows):
            raise BadMessage(f"{kind} names rows outside 0:{batch}")

    def _crop(self, kept: int) -> None:
        removed = self.n_tokens - kept
        for layer in self._owned:
            # Recurrent layers know no crop without recording, not even one of nothing.
            if self.n_tokens and (removed or getattr(layer, "record_past", True)):
                layer.crop(-removed)
        self.n_tokens = kept

    def _take_rows(self, rows: torch.Tensor) -> None:
        if self.batch is None:
            return
        for layer in self._owned:
            layer.reorder_cache(rows)
        self.batch = len(rows)

    def _reset(self) -> None:
        for layer in self._owned:
            # Recurrent layers would keep tensors of the old batch size, and write into them.
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.conv_states = dict.fromkeys(layer.conv_states)
                layer.recurrent_states = dict.fromkeys(layer.recurrent_states)
                layer.is_conv_states_initialized = dict.fromkeys(layer.is_conv_states_initialized, False)
                layer.is_recurrent_states_initialized = dict.fromkeys(layer.is_recurrent_states_initialized, False)
            layer.reset()
        self.n_tokens, self.batch = 0, None


class _Counter(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Stands for an attention layer of a kind that the span does not own: it knows lengths and has no states."""

    is_croppable = True

    def __init__(self, cache: SpanCache, window: int | None) -> None:
        cast(Any, super()).__init__()
        self._cache = cache
        self._window = window
        self.is_sliding = window is not None

    def get_seq_length(self) -> int:
        return self._cache.n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen, window = self._cache.n_tokens, self._window
        if window is None:
            return seen + query_length, 0
        return min(seen, window - 1) + query_length, max(seen - window + 1, 0)

    def get_max_length(self) -> int:
        return -1 if self._window is None else self._window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise RuntimeError("a block outside the span wrote to the cache")

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("a block outside the span wrote to the cache")


class _LinearCounter(LinearAttentionLayer):
    """Stands for a recurrent layer of a kind that the span does not own: it knows whether anything was seen."""

    def __init__(self, cache: SpanCache, number_of_states: int) -> None:
        self._cache = cache
        super().__init__(number_of_states=number_of_states)

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return dict.fromkeys(range(self.number_of_states), self._cache.n_tokens > 0)

    @has_previous_state.setter
    def has_previous_state(self, value: dict[int, bool]) -> None:
        """The base class sets it when it is made; what counts is the cache."""


def _stand_in(layer: Any, cache: SpanCache) -> Any:
    window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
    match isinstance(layer, CacheLayerMixin), isinstance(layer, LinearAttentionCacheLayerMixin):
        case True, True:
            raise ModelError("this architecture mixes blocks that are recurrent and attend at once with other blocks")
        case True, False:
            return _Counter(cache, window)
        case False, True:
            return _LinearCounter(cache, layer.number_of_states)
        case _:
            # It holds no state and answers no question about lengths.
            return layer


def _kind(layer: Any) -> tuple[type, Any]:
    """Layers of one kind answer the decoder's questions about lengths and masks alike."""
    return type(layer), getattr(layer, "sliding_window", None)


def _can_crop(layer: Any, removed: int) -> bool:
    """Can `layer` give up its last `removed` tokens and be as if they had never come?"""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if any(layer.is_recurrent_states_initialized.values()) or not layer.record_past:
            return False
        sizes = layer.conv_kernel_size
        for i, states in layer.conv_states.items():
            if states is not None and states.shape[-1] - removed < cast(int, sizes[i]):
                return False
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length >= layer.sliding_window:
        if not layer.record_past or layer.keys is None:
            return False
        needed = min(layer.sliding_window - 1, layer.cumulative_length - removed)
        return layer.keys.shape[-2] - removed >= needed
    return True


def _tensors(layer: Any) -> list[torch.Tensor]:
    values: list[Any] = []
    for value in vars(layer).values():
        values.extend(value.values() if isinstance(value, dict) else [value])
    return [value for value in values if isinstance(value, torch.Tensor) and not value.is_meta]
