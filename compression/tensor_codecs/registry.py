"""Which codecs there are. Which of them a chain uses, its client decides from what the peers offer."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Final

from protocol.errors import ConfigError
from tensor_codecs.base import Codec
from tensor_codecs.bf16 import Bf16Codec
from tensor_codecs.blockwise8 import Blockwise8Codec
from tensor_codecs.fp16 import Fp16Codec
from tensor_codecs.int8 import Int8Codec
from tensor_codecs.none import NoCodec

DEFAULT: Final = Int8Codec.name

# In order of preference. `bf16` before `fp16`: nothing overflows. `none` last: what all sides know when all else fails.
_CODECS: Final[dict[str, Codec]] = {
    each.name: each for each in (Int8Codec(), Bf16Codec(), Fp16Codec(), Blockwise8Codec(), NoCodec())
}


@cache
def names() -> tuple[str, ...]:
    """The codecs that work on this machine, best first. `blockwise8` is among them where bitsandbytes is installed."""
    return tuple(name for name in _CODECS if name != Blockwise8Codec.name or find_spec("bitsandbytes"))


def codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        ConfigError: there is none on this machine; the message lists those that there are.
    """
    if name not in names():
        raise ConfigError(f"no codec {str(name)[:40]!r} here; there are: {', '.join(names())}")
    return _CODECS[name]
