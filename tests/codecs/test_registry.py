"""Names, the default, and what is offered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protocol.errors import ConfigError
from tensor_codecs import DEFAULT, Codec, codec, names, registry


def test_names() -> None:
    assert names() == ("int8", "bf16", "fp16", "blockwise8", "none")
    assert names()[0] == DEFAULT
    for name in names():
        assert isinstance(codec(name), Codec)
        assert codec(name).name == name


@pytest.mark.parametrize("name", ["", "INT8", "int4", "x" * 10_000, None, 8])
def test_an_unknown_name_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match="there are: int8") as caught:
        codec(name)
    assert len(str(caught.value)) < 200


def test_without_bitsandbytes_its_codec_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    names.cache_clear()
    try:
        assert "blockwise8" not in names()
        with pytest.raises(ConfigError, match="there are: int8"):
            codec("blockwise8")
    finally:
        names.cache_clear()


def test_the_import_does_not_bring_bitsandbytes() -> None:
    program = "import sys, tensor_codecs as t; [t.codec(n) for n in t.names()]; sys.exit('bitsandbytes' in sys.modules)"
    path = [p for p in sys.path if p]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {program}"], check=True, timeout=120)
