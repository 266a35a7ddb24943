"""Which scenarios there are: name -> (module, what it measures)."""

from __future__ import annotations

from typing import Final

PAGES: Final[dict[str, tuple[str, str]]] = {
    "codecs": ("benchmarks.codecs", "bytes, error and time of each codec; writes docs/codecs.md"),
    "accuracy": ("benchmarks.accuracy", "right answers of the demo model with each codec; writes docs/accuracy.md"),
    "liars": ("benchmarks.liars", "liars of each kind against audits; writes docs/lying-peers.md"),
    "swarm": ("benchmarks.swarm", "coverage, moves and throughput of a simulated swarm; writes docs/swarm.md"),
}
"""Each module has `run() -> None`, which prints its report and writes it to `docs/`."""

MEASURED: Final[dict[str, tuple[str, str]]] = {
    "single": ("benchmarks.single", "one stream over 1, 2 and 4 peers against the unsplit model"),
    "hop": ("benchmarks.hop", "what each hop costs per token"),
    "ttft": ("benchmarks.ttft", "first token of prompts of 64 to 2,048 tokens"),
    "concurrency": ("benchmarks.concurrency", "1 to 16 clients at once"),
    "api": ("benchmarks.api", "1 to 16 requests at once through one API process"),
    "interference": ("benchmarks.interference", "a long prompt beside sessions that decode"),
    "pipeline": ("benchmarks.pipeline", "a long prompt over emulated devices"),
    "wan": ("benchmarks.wan", "links of 5 to 50 ms, 100 Mbit/s; prompt lookup"),
    "tunnel": ("benchmarks.tunnel", "the same links with TCP over the whole distance (root)"),
    "failover": ("benchmarks.failover", "a peer is killed, or freezes, in the middle of an answer"),
    "forward": ("benchmarks.forward", "a batch without a cache"),
    "memory": ("benchmarks.memory", "memory and processes of a peer"),
    "startup": ("benchmarks.startup", "from the command to the first served token"),
    "threads": ("benchmarks.threads", "how many threads, and whether they spin"),
}
"""Each module has `measure(quick) -> Result`; together they write docs/performance.md."""
