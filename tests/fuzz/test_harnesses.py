"""Each harness for a moment, with inputs bred from its seeds, always the same ones; and all that was ever found."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.fuzz.breeding import bred
from tests.fuzz.target import FOUND, PURE, Guarded, can_limit, found, load

SEED = int(os.environ.get("FUZZ_SEED", "20"))

pytestmark = pytest.mark.skipif(not can_limit(), reason="no /proc to measure one input's memory with")


@pytest.fixture(autouse=True)
def _collected_again() -> Iterator[None]:
    """What a harness has frozen, so that its collection is not counted, is garbage like any other afterwards."""
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", PURE)
def test_harness(name: str) -> None:
    target = load(name)
    guarded = Guarded(target)
    for path in found(name):
        guarded(path.read_bytes())
    for data in bred(target.seeds(), target.short, SEED, target.longest):
        try:
            guarded(data)
        except BaseException:
            print(f"{name}: {data!r}")
            raise


def test_all_that_was_found_is_replayed() -> None:
    names = {path.name.split("-")[0] for path in FOUND.iterdir() if not path.name.startswith(".")}
    assert names <= set(PURE)
