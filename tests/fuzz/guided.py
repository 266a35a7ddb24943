"""One harness under atheris, which looks at coverage: `python -m tests.fuzz.guided TARGET SECONDS FOLDER`.

The folder holds the corpus that grows. An input that breaks something is written to `tests/fuzz/found`, and this ends
with an exit code that is not 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

from tests.fuzz.target import FOUND, Guarded, load

PACKAGES = ["protocol", "tensor_codecs", "dht", "slicing", "peer", "client"]
MOST_MIB = 3072  # torch, transformers and the corpus; what an input may take more is the harness's to say
HANGS_S = 60


def main(name: str, seconds: int, folder: Path) -> None:
    """Does not return."""
    with atheris.instrument_imports(include=PACKAGES):
        target = load(name)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={target.longest}",
        f"-artifact_prefix={FOUND}/{name}-",
        f"-rss_limit_mb={MOST_MIB}",
        f"-timeout={HANGS_S}",
        "-print_final_stats=1",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], Guarded(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
