"""What a harness keeps: `python -m tests.fuzz.growth TARGET SECONDS FOLDER`, with inputs bred from a fuzzer's corpus.

Under the fuzzer memory grows by its books, some 30 bytes for each input. Here there is none.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from pathlib import Path

import psutil

from tests.fuzz.breeding import bred
from tests.fuzz.target import load

SETTLED = 0.2  # of the time: what is only made once, was made
AT_ONCE = 1000


def main(name: str, seconds: float, folder: Path) -> None:
    """Says how many inputs were tried, and by how many bytes the process grew after the first fifth of the time."""
    target, process = load(name), psutil.Process()
    corpus = [*target.seeds(), *(path.read_bytes() for path in sorted(folder.iterdir()))]
    inputs = itertools.chain.from_iterable(bred(corpus, AT_ONCE, seed, target.longest) for seed in itertools.count())
    tried, before, counted = 0, 0, 0
    while (passed_s := time.process_time()) < seconds or not before:
        for data in itertools.islice(inputs, AT_ONCE):
            target.run(data)
            tried += 1
        if not before and passed_s > SETTLED * seconds:
            gc.collect()
            before, counted = process.memory_info().rss, tried
    gc.collect()
    print(f"inputs: {tried - counted} kept: {process.memory_info().rss - before}")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
