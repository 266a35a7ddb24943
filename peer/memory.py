"""How much memory there is, and what fits into it."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

from slicing.checkpoint import stored_tensors
from slicing.source import ModelSource

KV_SHARE = 0.25  # of the memory that is free after loading
KV_TOKENS_MAX = 1 << 20
KV_TOKENS_MIN = 512
WEIGHTS_SHARE = 0.6  # of the free memory, when the span's length is chosen by it


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Hands memory that ended sessions freed back to the system; glibc would keep it. Elsewhere it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def checkpoint_bytes(source: ModelSource) -> int:
    """Bytes of all tensors of a model, as its files' headers tell."""
    return sum(stored.nbytes for stored in stored_tensors(source).values())


def kv_tokens(free: int, bytes_per_token: int) -> int:
    """Tokens of KV cache for all sessions together: a share of what is free, within sane bounds."""
    return max(KV_TOKENS_MIN, min(KV_TOKENS_MAX, int(free * KV_SHARE) // max(1, bytes_per_token)))


def blocks_that_fit(free: int, bytes_per_block: int, n_blocks: int) -> int:
    """How many blocks' weights to load, leaving room for caches."""
    return max(1, min(n_blocks, int(free * WEIGHTS_SHARE) // max(1, bytes_per_block)))
