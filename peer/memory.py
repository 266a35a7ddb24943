"""How much memory there is, and what fits into it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Sequence

import psutil
import torch

from protocol.errors import UserError

KV_SHARE = 0.25  # of the memory that is free after loading
KV_TOKENS_MAX = 1 << 20
KV_TOKENS_MIN = 512
KV_TOKENS_PLANNED = 8192
"""Room for so many tokens is left when the span's length is chosen, unless the user says how many."""
MARGIN_SHARE = 0.2
"""Of the free memory: for activations, messages, and other programs. What is chosen leaves it alone."""
SHRINK = 0.8
"""A span that did not fit after all becomes so much shorter."""


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; of the machine for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def allocated_bytes(device: torch.device) -> int | None:
    """What tensors take of a GPU's memory; None: not a GPU. torch is asked, not the driver, which may wait for it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def give_back() -> None:
    """Hands memory that ended sessions freed back to the system; glibc would keep it. Elsewhere it does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_weights() -> None:
    """The same for weights that nobody refers to any more: modules are cycles, and torch keeps a GPU's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back()


def kv_tokens(free: int, bytes_per_token: int) -> int:
    """Tokens of KV cache for all sessions together: a share of what is free after loading, or what was planned, if
    that takes no more than half; within sane bounds."""
    share, planned = int(free * KV_SHARE), min(KV_TOKENS_PLANNED * bytes_per_token, free // 2)
    return max(KV_TOKENS_MIN, min(KV_TOKENS_MAX, max(share, planned) // max(1, bytes_per_token)))


def blocks_that_fit(
    free: int, block_bytes: Sequence[int], legal_cuts: Sequence[int], kv_bytes_per_block: int, *, what: str = "memory"
) -> int:
    """The largest number of blocks so that every legal span of at most as many fits, with its caches and the margin.

    Where blocks are uneven, the heaviest spans decide: which one is needed is not known yet.

    Args:
        free: bytes of memory that are free now, with other peers of this machine in what is not.
        block_bytes: of each block's weights, in the number format to compute in.
        legal_cuts: where the model may be cut, ascending, 0 and the number of blocks among them.
        kv_bytes_per_block: of the caches of all sessions, in one block.
        what: names the memory, for the error.

    Raises:
        UserError: not even the shortest spans fit.
    """
    usable = free - int(free * MARGIN_SHARE)
    fitting = 0
    heaviest = _heaviest(block_bytes, legal_cuts)
    for length in sorted(heaviest):
        if heaviest[length] + length * kv_bytes_per_block > usable:
            break
        fitting = length
    if not fitting:
        shortest = min(heaviest)
        caches = shortest * kv_bytes_per_block
        raise UserError(
            f"not even {shortest} of the model's {len(block_bytes)} blocks {'fits' if shortest == 1 else 'fit'}: "
            f"weights of {in_mib(heaviest[shortest])} and caches of {in_mib(caches)} are needed, "
            f"{in_mib(usable)} of {in_mib(free)} free {what} can be used; "
            "free some, or try --quantization int8 or a smaller --kv-tokens"
        )
    return fitting


def fewer_blocks(num_blocks: int, legal_cuts: Sequence[int]) -> int | None:
    """To how many blocks to shrink a span of `num_blocks` that did not fit; None: there are no shorter ones."""
    shorter = [length for length in _lengths(legal_cuts) if length < num_blocks]
    wanted = int(num_blocks * SHRINK)
    return max((length for length in shorter if length <= wanted), default=min(shorter, default=None))


def in_mib(nbytes: int) -> str:
    """For people: `1,234 MiB`."""
    return f"{nbytes / 2**20:,.0f} MiB"


def _lengths(legal_cuts: Sequence[int]) -> list[int]:
    return sorted({stop - start for start in legal_cuts for stop in legal_cuts if start < stop})


def _heaviest(block_bytes: Sequence[int], legal_cuts: Sequence[int]) -> dict[int, int]:
    """For each length of legal spans, the bytes of the heaviest one."""
    found: dict[int, int] = {}
    for start in legal_cuts:
        for stop in legal_cuts:
            if start < stop:
                nbytes = sum(block_bytes[start:stop])
                found[stop - start] = max(found.get(stop - start, 0), nbytes)
    return found
