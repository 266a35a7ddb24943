"""What a peer process holds of the machine: memory and descriptors."""

from __future__ import annotations

from pathlib import Path

import psutil

SINCERE_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10), "MALLOC_ARENA_MAX": "2"}
"""glibc gives back what is freed, so that memory in use is memory that is held. By default it learns to keep blocks of
up to 32 MiB: then one large step makes 30 MiB of difference, in whichever round it falls."""

GROWTH_BYTES = 8 << 20
"""Between the second and the fifth round of anything that strangers do."""


def uss_bytes(pid: int) -> int:
    """Memory that the process shares with nobody."""
    return int(psutil.Process(pid).memory_full_info().uss)


def descriptors(pid: int) -> int:
    """Open files and sockets of the process."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
