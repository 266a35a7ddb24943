"""A device's mark tells of two peers whether they share it, and nothing of what it is."""

from __future__ import annotations

import subprocess
import sys

import torch

from peer import device


def test_processes_of_a_machine_agree_and_devices_differ() -> None:
    program = "import torch; from peer.device import mark; print(mark(torch.device('cpu')))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == device.mark(torch.device("cpu"))
    devices = ("cpu", "cuda", "cuda:1", "mps")
    assert len({device.mark(torch.device(name)) for name in devices}) == len(devices)
    assert device.mark(torch.device("cuda")) == device.mark(torch.device("cuda:0")), "torch's default"
