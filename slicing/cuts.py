"""Where a model may be cut into spans. Pure functions of its configuration.

A cut before block i is illegal where block i uses something other than the hidden states that an earlier block made:

- **shared KV** (gemma3n, gemma4, mistral_large4): blocks whose mode is "reuse" read keys and values of an earlier
  "store" block, so no cut may separate the two;
- **shared indexer** (glm_moe_dsa and kin): a block of type "shared" reads the token choice of the block before it.

Some architectures would compute something else in spans than unsplit, or cannot run; they are refused as a whole.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.errors import IllegalCut, ModelError
from protocol.span import Span
from slicing.config import n_blocks, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROVEN = frozenset(
    """
    afmoe apertus arcee axk1 bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe deepseek_v2
    deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
    falcon_mamba flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm4 glm4_moe glm4_moe_lite
    glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
    granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kimi_linear laguna lfm2 lfm3 llama llama4_text llava mamba mamba2
    mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral3 mistral4 mixtral mpt nanochat
    nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe
    qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
    """.split()  # noqa: SIM905 (a literal would take a line for each)
)
"""Model types that tests/slicing proves to compute, cut into spans, exactly what they compute unsplit."""

REFUSED: dict[str, str] = {
    "zamba2": "its blocks also read the token embeddings, which a span never sees",
    "zamba": "its blocks also read the token embeddings, which a span never sees",
    "recurrent_gemma": "it keeps its recurrent state inside its blocks, not in a cache of a session's own",
    "rwkv": "it keeps its recurrent state in a list of its own, not in a cache that could be divided",
    "xlstm": "it keeps its recurrent state in a cache of its own, which could not be divided",
    "dbrx": "transformers 5 itself cannot build it",
    "minimax": "it insists on a cache class of its own, which could not be divided",
    "modernbert-decoder": "its decoder reads the token embeddings, which a span never sees",
    "hy_v4": "it carries several streams of hidden states, in a layout that steps cannot carry",
    "deepseek_v4": "it carries several streams of hidden states, in a layout that steps cannot carry",
    "glm5_next": "it carries several streams of hidden states, in a layout that steps cannot carry",
    "qwen4_exp": "it carries several streams of hidden states, in a layout that steps cannot carry",
    "qwen4_exp_text": "it carries several streams of hidden states, in a layout that steps cannot carry",
}
"""Model types that are not sliced, and why."""

logger = logging.getLogger(__name__)


def is_proven(config: PreTrainedConfig) -> bool:
    """Is the architecture among those whose spans are tested to compute exactly what the unsplit model computes?"""
    return config.model_type in PROVEN


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise unless the architecture may be sliced; log a warning where nobody has proven that it may.

    Raises:
        ModelError: it would compute something else than unsplit, or cannot run; the message says why.
    """
    for model_type in (config.model_type, text_config(config).model_type):
        if model_type in REFUSED:
            raise ModelError(f"architecture {model_type!r} cannot be sliced: {REFUSED[model_type]}")
    if not is_proven(config):
        logger.warning("%r is not among the architectures that are tested to give the same in spans", config.model_type)


def legal_cuts(config: PreTrainedConfig) -> tuple[int, ...]:
    """The block indices before which the model may be cut, ascending; 0 and `n_blocks` are always among them."""
    n = n_blocks(config)
    bound = _blocks_bound_to_their_left(text_config(config), n)
    return tuple(i for i in range(n + 1) if i not in bound)


def check_span(config: PreTrainedConfig, span: Span) -> None:
    """Raise unless `span` lies within the model and begins and ends at legal cuts.

    Raises:
        IllegalCut: it does not; `nearest` holds the legal spans around it: the largest inside, the smallest covering.
    """
    cuts = legal_cuts(config)
    if span.start in cuts and span.stop in cuts:
        return
    nearest = nearest_spans(cuts, span)
    names = " or ".join(map(str, nearest))
    n = cuts[-1]
    if span.stop > n:
        raise IllegalCut(f"the model has blocks 0:{n}, not {span}; nearest: {names}", nearest=map(str, nearest))
    at = ", ".join(str(cut) for cut in (span.start, span.stop) if cut not in cuts)
    raise IllegalCut(
        f"{config.model_type} cannot be cut before block {at} (its blocks share state there); nearest: {names}",
        nearest=map(str, nearest),
    )


def nearest_spans(cuts: Sequence[int], span: Span) -> tuple[Span, ...]:
    """The legal spans nearest to `span`: the largest that lies inside it (if any), then the smallest that covers it.

    Where `span` reaches past the end of the model, the part inside the model is meant.
    """
    n = cuts[-1]
    start, stop = min(span.start, n - 1), min(span.stop, n)
    inner = (cuts[bisect_left(cuts, start)], cuts[bisect_right(cuts, stop) - 1])
    outer = (cuts[bisect_right(cuts, start) - 1], cuts[bisect_left(cuts, stop)])
    found = [Span(*inner)] if inner[0] < inner[1] else []
    return tuple(dict.fromkeys([*found, Span(*outer)]))


def _blocks_bound_to_their_left(config: PreTrainedConfig, n: int) -> set[int]:
    """The blocks i before which the model must not be cut."""
    bound: set[int] = set()
    modes = getattr(config, "kv_sharing_modes", None) or ()
    sources = getattr(config, "kv_source_layers", None) or ()
    reusing = [i for i, mode in enumerate(modes) if mode is not None and mode.startswith("reuse")]
    # Without a list of sources, which block is read depends on layer types: all from the first store on stay together.
    first = min((i for i, mode in enumerate(modes) if mode == "store"), default=0)
    for block in reusing:
        bound |= set(range((sources[block] if sources else first) + 1, block + 1))
    bound |= {i for i, kind in enumerate(getattr(config, "indexer_types", None) or ()) if kind == "shared"}
    return bound & set(range(1, n))
