"""What `tests.forks` imports before it forks: all that the commands import, as they do it. Importing it is its work."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path

from protocol.command import importing, tame_libraries

MODULES = (
    "client.status",
    "client.text",
    "dht.bootstrap",
    "peer.assembly",
    "peer.progress",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)

tame_libraries()
with importing():
    for name in MODULES:
        import_module(name)
assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads do not survive a fork"
gc.collect()
gc.freeze()  # what all share stays shared: collections of the forked ones leave it alone
