"""A conversation with a model: what of it the peers have already, and what has to be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from client.remote import Reservation
from slicing import RemoteCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GenerationSession:
    """A conversation: what was said stays on the peers, only new tokens travel. Made by `model.session()`.

    One answer at a time; several sessions of a model may be at work in as many threads.

    Attributes:
        cache: the session's cache; pass it as `past_key_values` to go lower than `generate`.
        tokens: int64 [rows, n], the tokens that the peers have, as far as `generate` made them; None before.

    Args:
        window: a cache of so many tokens or more cannot be cropped; None: it always can.
    """

    def __init__(self, max_tokens: int, window: int | None = None) -> None:
        self._reservation = Reservation(max_tokens)
        self._window = window
        self.cache = self._new_cache()
        self.tokens: Tensor | None = None

    def align(self, input_ids: Tensor) -> RemoteCache:
        """The cache, cropped to what `input_ids` has in common with it; a new one where that cannot be.

        At least one token is left to be sent: `generate` needs its logits.

        Args:
            input_ids: int64 [rows, n], all tokens of the conversation so far.
        """
        kept = self.cache.n_tokens
        if self.tokens is None or self.tokens.shape[0] != input_ids.shape[0]:
            kept = 0
        else:
            kept = min(kept, _common_prefix(self.tokens, input_ids), input_ids.shape[1] - 1)
        crops = kept < self.cache.n_tokens
        if crops and (kept == 0 or (self._window is not None and self.cache.n_tokens >= self._window)):
            self.cache = self._new_cache()
        elif crops:
            self.cache.crop(kept - self.cache.n_tokens)
        return self.cache

    def _new_cache(self) -> RemoteCache:
        cache = RemoteCache()
        cache.handle = self._reservation
        return cache

    def note(self, sequences: Tensor | None) -> None:
        """After `generate`: the peers have all of `sequences` but its last token. None: rows were moved about.

        Args:
            sequences: int64 [rows, n].
        """
        self.tokens = sequences
        if sequences is None:
            self.cache = self._new_cache()


def _common_prefix(a: Tensor, b: Tensor) -> int:
    """How many leading tokens are equal in all rows of a and b, int64 [rows, n] and [rows, m]."""
    length = min(a.shape[1], b.shape[1])
    equal = (a[:, :length].to(b.device) == b[:, :length]).all(dim=0)
    return int(equal.long().cumprod(0).sum())


def max_cached(config: PreTrainedConfig) -> int | None:
    """From how many tokens on a cache of the model cannot be cropped, since windows and running states forget; None: it
    always can."""
    windows: list[int] = []
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            windows.append(0)
        elif getattr(layer, "is_sliding", False):
            windows.append(cast(Any, layer).sliding_window)
    return min(windows, default=None)
