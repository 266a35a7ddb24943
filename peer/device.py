"""Which device this is, told without telling what it is: peers of the same mark share a processor.

Several peers may run on one machine, each as a process of its own. Clients have no use for working on both at once, if
they share the cores, or the GPU.
"""

from __future__ import annotations

import hashlib
import uuid
from functools import cache
from pathlib import Path

import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MARK_BYTES = 8


def mark(device: torch.device) -> str:
    """The same for all processes of this machine on that device, until it is started anew; hexadecimal."""
    name = f"{_machine()}/{device.type}/{device.index or 0}"
    return hashlib.blake2b(name.encode(), digest_size=_MARK_BYTES).hexdigest()


@cache
def _machine() -> str:
    """A number that Linux draws when it starts, also for what runs in its containers; elsewhere the network card's."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else f"{uuid.getnode():012x}"
