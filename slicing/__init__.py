"""Cut any Hugging Face causal language model into spans of blocks, and run them apart.

| for | there is |
|---|---|
| finding a model | `resolve` -> `ModelSource` |
| knowing it without its weights | `load_config`, `n_blocks`, `hidden_size`, `kv_values`, `block_bytes` |
| | `legal_cuts`, `check_span`, `fingerprint` |
| a peer | `load_span`, `move_span` -> `SpanModel`, its `step`, `new_cache` -> `SpanCache`, `CacheOp`; `block_digests` |
| | `RaggedSpan`: steps of many sessions in one pass, `Stretch` and `PagedCache` each; `trouble` says if it is exact |
| a client | `load_head` -> `Head`, to which it attaches a `Remote`; `RemoteCache` |
| both | `hasten`: a few rows times a large matrix |

Names are imported on first use: what only concerns files and cuts does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicing.blocks import block_bytes
    from slicing.cache import CacheOp, SpanCache
    from slicing.config import hidden_size, is_routed, kv_values, load_config, model_class, n_blocks
    from slicing.cuts import check_architecture, check_span, is_proven, legal_cuts, nearest_spans
    from slicing.fingerprints import block_digests, fingerprint
    from slicing.head import Head, load_head
    from slicing.loading import LoadReport, Progress
    from slicing.paged import PagedCache
    from slicing.proof import trouble
    from slicing.ragged import RaggedSpan, Stretch
    from slicing.remote import Remote, RemoteCache
    from slicing.rows import hasten
    from slicing.source import ModelSource, resolve
    from slicing.span_model import SpanModel, load_span, move_span

__all__ = [
    "CacheOp",
    "Head",
    "LoadReport",
    "ModelSource",
    "PagedCache",
    "Progress",
    "RaggedSpan",
    "Remote",
    "RemoteCache",
    "SpanCache",
    "SpanModel",
    "Stretch",
    "block_bytes",
    "block_digests",
    "check_architecture",
    "check_span",
    "fingerprint",
    "hasten",
    "hidden_size",
    "is_proven",
    "is_routed",
    "kv_values",
    "legal_cuts",
    "load_config",
    "load_head",
    "load_span",
    "model_class",
    "move_span",
    "n_blocks",
    "nearest_spans",
    "resolve",
    "trouble",
]

_HOME = {
    "slicing.blocks": ("block_bytes",),
    "slicing.cache": ("CacheOp", "SpanCache"),
    "slicing.config": ("hidden_size", "is_routed", "kv_values", "load_config", "model_class", "n_blocks"),
    "slicing.cuts": ("check_architecture", "check_span", "is_proven", "legal_cuts", "nearest_spans"),
    "slicing.fingerprints": ("block_digests", "fingerprint"),
    "slicing.head": ("Head", "load_head"),
    "slicing.loading": ("LoadReport", "Progress"),
    "slicing.paged": ("PagedCache",),
    "slicing.proof": ("trouble",),
    "slicing.ragged": ("RaggedSpan", "Stretch"),
    "slicing.remote": ("Remote", "RemoteCache"),
    "slicing.rows": ("hasten",),
    "slicing.source": ("ModelSource", "resolve"),
    "slicing.span_model": ("SpanModel", "load_span", "move_span"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
