"""What importing hivemind's discovery costs, and that the rest of it is there for who asks."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import dht.node

training = [name for name in ("hivemind.moe", "hivemind.optim", "hivemind.averaging", "torch") if name in sys.modules]
assert not training, training

import hivemind
from hivemind.utils import MPFuture, get_logger

assert MPFuture.__module__ == "hivemind.utils.mpfuture"
assert get_logger is sys.modules["hivemind.utils.logging"].get_logger

assert hivemind.dht is sys.modules["hivemind.dht"]
assert hivemind.Optimizer.__module__.startswith("hivemind.optim")
assert hivemind.DHT is sys.modules["hivemind.dht.dht"].DHT
assert hivemind.__version__
assert not hasattr(hivemind, "nothing")
"""


def test_half_of_hivemind_is_not_imported_until_somebody_asks_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
