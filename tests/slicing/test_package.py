"""What the package offers, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import slicing
from slicing.cache import SpanCache
from slicing.source import resolve


def test_everything_in_all_is_there_and_has_a_docstring() -> None:
    assert sorted(slicing.__all__) == slicing.__all__
    for name in slicing.__all__:
        assert getattr(slicing, name).__doc__, name
    assert set(dir(slicing)) == set(slicing.__all__)
    assert {name for names in slicing._HOME.values() for name in names} == set(slicing.__all__)
    assert slicing.SpanCache is SpanCache
    assert slicing.resolve is resolve


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(slicing, "nothing")


def test_finding_models_and_cuts_does_not_wait_for_torch() -> None:
    program = (
        "import sys, slicing, slicing.source, slicing.cuts, slicing.checkpoint, slicing.fingerprints\n"
        "slicing.resolve, slicing.legal_cuts, slicing.fingerprint\n"
        "loaded = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
