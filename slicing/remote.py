"""What stands between a head and its blocks: the interface to them, and the cache that a client sees of theirs."""

from __future__ import annotations

import weakref
from typing import Any, NoReturn, Protocol, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from slicing.cache import CacheOp


class Remote(Protocol):
    """All blocks of the model, somewhere else."""

    def run(
        self,
        hidden: Tensor,
        *,
        cache: RemoteCache | None,
        ops: tuple[CacheOp, ...],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        extras: dict[str, Tensor],
    ) -> Tensor:
        """Pass q tokens of B rows through every block; blocks the caller until the result is there.

        Where this raises, the head's forward raises the same, and `cache` still holds `ops` for another try.

        Args:
            hidden: [..., B, q, H], the head's dtype, on its device.
            cache: the session, of which `cache.n_tokens` tokens are done; None for a pass without memory.
            ops: to be done to the session's cache first, in this order.
            attention_mask: bool [B, n + q] where a row has padding, else None. n is the number of tokens after `ops`.
            position_ids: where they are not n, n + 1, ..., or where there is padding; [1 or B, q]. Else None.
            extras: the tensors by name that the architecture's blocks need beside the hidden states.

        Returns:
            hidden states after the last block: shape and device of `hidden`, and its dtype, or float32 where the
            architecture adds up hidden states in it (mamba, mamba2).
        """
        ...


class RemoteCache(Cache):
    """What `generate` takes for a cache: it counts tokens, and notes operations for the peers, where the states are.

    Pass it as `past_key_values` (mamba: `cache_params`) again to go on with a conversation: only new tokens are sent.

    Attributes:
        n_tokens: tokens that the peers will have in their caches once `pending` is done.
        pending: operations that ride on the next step.
        handle: the Remote's own, e.g. its session; None until it sets it.
    """

    def __init__(self) -> None:
        self.n_tokens = 0
        self.pending: list[CacheOp] = []
        self.handle: object | None = None
        super().__init__(layers=[cast(Any, _RemoteLayer(self))])

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' convention: `tokens_to_remove` is minus the number of tokens to forget, the last ones."""
        if not -self.n_tokens <= tokens_to_remove <= 0:
            raise ValueError(
                f"{-tokens_to_remove} of {self.n_tokens} tokens cannot be cropped; pass minus their number"
            )
        self.n_tokens += int(tokens_to_remove)
        if self.pending and self.pending[-1].kind == "crop":
            self.pending.pop()
        self.pending.append(CacheOp("crop", self.n_tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.pending.append(CacheOp("reorder", tuple(beam_idx.tolist())))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.pending.append(CacheOp("repeat", int(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.pending.append(CacheOp("select", tuple(indices.tolist())))

    def activate_past_recording(self) -> None:
        self.pending.append(CacheOp("record_past"))

    def reset(self) -> None:
        self.pending.append(CacheOp("reset"))
        self.n_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.n_tokens > 0

    @property
    def is_croppable(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a RemoteCache cannot be copied: its states are on the peers")


class _RemoteLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """The one layer of a RemoteCache, for code that looks at `cache.layers`."""

    def __init__(self, cache: RemoteCache) -> None:
        cast(Any, super()).__init__()
        # The cache owns the layer. A cycle would keep the peers' memory until Python looks for cycles.
        self._cache: RemoteCache = weakref.proxy(cache)
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._cache.n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.n_tokens + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a remote cache holds no states")
