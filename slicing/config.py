"""A model's configuration, and what slicing needs to know of it: its class, its number of blocks, their width."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from protocol.errors import BrokenCheckpoint, ModelError, NoBlockStack, RemoteCodeRefused

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from slicing.source import ModelSource


def read_config(source: ModelSource) -> dict[str, Any]:
    """config.json as it is written, without any default that a version of transformers would add.

    Raises:
        BrokenCheckpoint: it is not a JSON object.
        UnknownModel: the hub cannot be reached.
    """
    try:
        raw = json.loads(source.file("config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"config.json of {source.name!r} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BrokenCheckpoint(f"config.json of {source.name!r} is not a JSON object")
    return raw


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration as transformers' own class for the architecture.

    Raises:
        RemoteCodeRefused: only code that came with the weights could run the model.
        ModelError: this transformers does not know the architecture, or does not accept the configuration.
        BrokenCheckpoint, UnknownModel: see `read_config`.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = read_config(source)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise RemoteCodeRefused(
                f"model {source.name!r} (model_type {model_type!r}) needs trust_remote_code: it runs only with Python "
                "code that came with its weights, and Potluck never runs such code; use a model of an architecture "
                f"that transformers {transformers.__version__} has itself"
            )
        raise ModelError(
            f"transformers {transformers.__version__} knows no architecture {model_type!r} (model {source.name!r}); "
            "a newer one may"
        )
    # A model with code of its own *and* a native class (auto_map beside a known model_type) runs with the native one.
    folder = source.file("config.json").parent
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"transformers does not accept config.json of {source.name!r}: {error}") from error
    # transformers writes the folder here, which says nothing on another machine
    config = part_that_writes(config)
    config.name_or_path = source.name
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model {source.name!r} is stored quantised, which Potluck cannot load yet; name one that is not"
        )
    return config


def part_that_writes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text part of a composite configuration whose causal LM class takes only that; any other as it is.

    (qwen3_5 has one class for text and one for all; gemma3 has one class for both.)
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        wanted = model_class(config).config_class
        if wanted is not type(config) and wanted is config.sub_configs.get("text_config"):
            return text_config(config)
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a composite (vision, audio) configuration that shapes the decoder; a plain one as it is."""
    return config.get_text_config(decoder=True)


def n_blocks(config: PreTrainedConfig) -> int:
    """How many decoder blocks the model has.

    Raises:
        NoBlockStack: the configuration does not say.
    """
    n = getattr(text_config(config), "num_hidden_layers", None)
    if not isinstance(n, int) or n < 1:
        raise NoBlockStack(f"architecture {config.model_type!r} has no stack of decoder blocks to slice")
    return n


def hidden_size(config: PreTrainedConfig) -> int:
    """The width H of the hidden states between blocks."""
    return cast(int, text_config(config).hidden_size)


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def is_routed(config: PreTrainedConfig) -> bool:
    """Do the model's tokens choose among experts? Rounding may then choose another one.

    Also said of the few that name a number of experts and have none.
    """
    text = text_config(config)
    return any(_most(getattr(text, name, None)) > 1 for name in _EXPERTS)


def _most(value: object) -> int:
    """Of a number, or of one for each block."""
    values = value if isinstance(value, list | tuple) else (value,)
    return max((one for one in values if isinstance(one, int)), default=0)


def hidden_dtypes(config: PreTrainedConfig) -> frozenset[torch.dtype]:
    """The dtypes that hidden states may have between blocks of a loaded model: its own, and for mamba float32 too."""
    import torch

    own = {config.dtype} if isinstance(config.dtype, torch.dtype) else set()
    return frozenset(own | ({torch.float32} if getattr(text_config(config), "residual_in_fp32", False) else set()))


def kv_values(config: PreTrainedConfig) -> int:
    """About how many numbers one block keeps of one token: a key and a value for each KV head.

    An estimate before anything is loaded: latent attention and recurrent blocks keep less.
    """
    text = text_config(config)
    query_heads = getattr(text, "num_attention_heads", None) or 1
    heads = getattr(text, "num_key_value_heads", None) or query_heads
    if isinstance(heads, list | tuple):
        heads = max(heads)
    width = getattr(text, "head_dim", None) or -(-hidden_size(config) // query_heads)
    return 2 * int(heads) * int(width)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal LM class of the architecture; for composite ones that have none, the image-text-to-text class.

    Raises:
        NoBlockStack: an encoder, an encoder-decoder, or anything else that does not generate text left to right.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if not getattr(config, "is_encoder_decoder", False):
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            if type(config) in mapping:
                found = mapping[type(config)]
                return cast("type[PreTrainedModel]", found[0] if isinstance(found, tuple | list) else found)
    raise NoBlockStack(
        f"architecture {config.model_type!r} has no stack of decoder blocks to slice: it is no decoder-only text model"
    )
