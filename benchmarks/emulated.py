"""`python -m benchmarks.emulated MS serve ...`: a peer on a device that takes MS milliseconds per token and block.

It says that it is a device of its own. It waits that long in each block, in the thread that computes, and then runs
the block of a model so small that it costs nearly nothing: several such peers on one machine overlap as several devices
do. All else is `python -m peer serve`.
"""

from __future__ import annotations

import secrets
import sys
import time
from typing import Any

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peer import device
from peer.cli import cli


def slow_down(ms_per_token: float) -> None:
    """Every llama block of this process waits, from now on, for each row and token that it is given."""
    plain = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(hidden_states.shape[:-1].numel() * ms_per_token / 1e3)
        return plain(self, hidden_states, *args, **kwargs)

    LlamaDecoderLayer.forward = forward
    device.mark = lambda _: secrets.token_hex(8)


if __name__ == "__main__":
    slow_down(float(sys.argv.pop(1)))
    cli()
