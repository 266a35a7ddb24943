"""Tiny random models of many architectures, as data: 6 blocks, hidden size 64, vocabulary 257.

`make_checkpoint` writes one as transformers would, in several shards. `CUTS` says where each is cut in the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

N_BLOCKS = 6
VOCABULARY = 257


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _gpt(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": N_BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _plain(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2, **more}


_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_ROUTED = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 8, "head_dim": 16}
_HALF_SLIDING = ["sliding_attention", "full_attention"] * 3
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_INDEXER = {"first_k_dense_replace": 2, "n_group": 2, "topk_group": 1, "index_head_dim": 16, "index_n_heads": 2}
_SHARED_KV = {
    **_SLIDING,
    "layer_types": _HALF_SLIDING,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
# Of as many blocks as the text part, so that the search for the stack has to tell the two apart.
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": N_BLOCKS,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
}

REQUIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _common()),
    "mistral": ("mistral", _common(sliding_window=8)),
    "mixtral": ("mixtral", _common(**_LOCAL_EXPERTS, sliding_window=None)),
    "qwen2": ("qwen2", _common()),
    "qwen3": ("qwen3", _common(head_dim=16)),
    "qwen3_moe": (
        "qwen3_moe",
        _common(
            head_dim=16,
            moe_intermediate_size=48,
            num_experts=8,
            num_experts_per_tok=2,
            decoder_sparse_step=2,
            mlp_only_layers=[0],
        ),
    ),
    "qwen3_next": (
        "qwen3_next",
        _common(
            **_LINEAR,
            head_dim=16,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=48,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    "gemma2": ("gemma2", _common(**_SLIDING)),
    "gemma3_text": (
        "gemma3_text",
        _common(**_SLIDING, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2),
    ),
    "gemma3n": (
        "gemma3n_text",
        _common(
            **{**_SHARED_KV, "intermediate_size": [96] * N_BLOCKS},
            activation_sparsity_pattern=[0.0] * N_BLOCKS,
            laurel_rank=4,
            altup_num_inputs=4,
        ),
    ),
    "phi3": ("phi3", _common()),
    "olmo2": ("olmo2", _common()),
    "deepseek_v3": ("deepseek_v3", _common(**_MLA, **_ROUTED, first_k_dense_replace=2, n_group=2, topk_group=1)),
    "gpt_oss": ("gpt_oss", _common(**_SLIDING, **_LOCAL_EXPERTS, layer_types=_HALF_SLIDING)),
    "glm4_moe": ("glm4_moe", _common(**_ROUTED, head_dim=16, first_k_dense_replace=1)),
    "llama4_text": (
        "llama4_text",
        _common(
            head_dim=16,
            intermediate_size_mlp=96,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
            **_LOCAL_EXPERTS,
        ),
    ),
    "cohere2": ("cohere2", _common(**_SLIDING)),
    "granite": ("granite", _common(embedding_multiplier=3.0, residual_multiplier=0.5)),
    "starcoder2": ("starcoder2", _common(sliding_window=8)),
    "stablelm": ("stablelm", _common()),
    "gpt2": ("gpt2", _gpt()),
    "gpt_neox": ("gpt_neox", _common()),
    "gptj": ("gptj", _gpt(rotary_dim=8)),
    "opt": (
        "opt",
        _plain(
            ffn_dim=96,
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
        ),
    ),
    "bloom": ("bloom", _plain(n_layer=N_BLOCKS, n_head=4)),
    "falcon": (
        "falcon",
        _plain(
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=4,
            new_decoder_architecture=True,
            num_kv_heads=2,
            alibi=False,
        ),
    ),
    "mamba2": (
        "mamba2",
        _plain(num_hidden_layers=N_BLOCKS, state_size=8, num_heads=8, head_dim=16, expand=2, n_groups=1),
    ),
    "jamba": (
        "jamba",
        _common(
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=3,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        _common(
            layers_block_type=["mamba", "mlp", "attention"] * 2,
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=1,
        ),
    ),
}
"""Architectures that Potluck promises to serve."""

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", _common(tie_word_embeddings=True)),
    "ministral": ("ministral", _common(**_SLIDING)),
    "qwen2-sliding": ("qwen2", _common(use_sliding_window=True, sliding_window=8, max_window_layers=3)),
    "qwen2_moe": (
        "qwen2_moe",
        _common(moe_intermediate_size=48, shared_expert_intermediate_size=48, num_experts=8, num_experts_per_tok=2),
    ),
    "qwen3_5_text": ("qwen3_5_text", _common(**_LINEAR, head_dim=16)),
    "gemma": ("gemma", _common(head_dim=16)),
    "gemma4_text": ("gemma4_text", _common(**_SHARED_KV, global_head_dim=16)),
    "phi": ("phi", _common()),
    "phimoe": ("phimoe", _common(**_LOCAL_EXPERTS)),
    "olmo3": ("olmo3", _common(sliding_window=8)),
    "olmoe": ("olmoe", _common(num_experts=8, num_experts_per_tok=2)),
    "gpt_bigcode": ("gpt_bigcode", _gpt()),
    "gpt_neo": (
        "gpt_neo",
        _plain(
            num_layers=N_BLOCKS,
            num_heads=4,
            max_position_embeddings=128,
            attention_types=[[["global", "local"], 3]],
            window_size=8,
        ),
    ),
    "codegen": ("codegen", _gpt(rotary_dim=8)),
    "falcon-alibi": (
        "falcon",
        _plain(
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=4,
            new_decoder_architecture=False,
            multi_query=True,
            alibi=True,
        ),
    ),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": N_BLOCKS, "n_heads": 4, "max_seq_len": 128}),
    "opt-projected": (
        "opt",
        _plain(
            ffn_dim=96,
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
        ),
    ),
    "deepseek_v2": ("deepseek_v2", _common(**_MLA, **_ROUTED, first_k_dense_replace=1, n_group=1, topk_group=1)),
    "deepseek_v32": ("deepseek_v32", _common(**_MLA, **_ROUTED, **_INDEXER, index_topk=8)),
    "glm_moe_dsa": ("glm_moe_dsa", _common(**_MLA, **_ROUTED, **_INDEXER, index_topk=8)),
    "glm4": ("glm4", _common(head_dim=16)),
    "cohere": ("cohere", _common()),
    "granitemoe": ("granitemoe", _common(**_LOCAL_EXPERTS, embedding_multiplier=3.0)),
    "granitemoehybrid": (
        "granitemoehybrid",
        _common(
            **_LOCAL_EXPERTS,
            **_MAMBA,
            shared_intermediate_size=48,
            layer_types=["mamba", "attention"] * 3,
            mamba_expand=2,
        ),
    ),
    "smollm3": ("smollm3", _common(no_rope_layer_interval=3)),
    "nemotron": ("nemotron", _common()),
    "ernie4_5": ("ernie4_5", _common()),
    "exaone4": ("exaone4", _common(sliding_window=8, sliding_window_pattern=3)),
    "seed_oss": ("seed_oss", _common(head_dim=16)),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _common(head_dim=16)),
    "arcee": ("arcee", _common()),
    "apertus": ("apertus", _common()),
    "minimax_m2": ("minimax_m2", _common(**_LOCAL_EXPERTS, head_dim=16)),
    "mamba": ("mamba", _plain(num_hidden_layers=N_BLOCKS, state_size=8)),
    "bamba": ("bamba", _common(**_MAMBA, attn_layer_indices=[1, 4])),
    "falcon_h1": ("falcon_h1", _common(**_MAMBA, mamba_d_ssm=128)),
    "lfm2": ("lfm2", _common(layer_types=["conv", "full_attention"] * 3, block_multiple_of=8)),
    "diffllama": ("diffllama", _common()),
    "persimmon": ("persimmon", _common()),
    "minicpm3": ("minicpm3", _common(**_MLA)),
    "helium": ("helium", _common(head_dim=16)),
    "biogpt": ("biogpt", _common()),
    "nanochat": ("nanochat", _common()),
    "gemma3": (
        "gemma3",
        {
            "text_config": _common(
                **_SLIDING, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2
            ),
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 256,
        },
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **_common(sliding_window=8)},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 16},
            "image_token_index": 256,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": _common(rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
            "vision_config": _QWEN_VISION,
            "image_token_id": 256,
        },
    ),
    "qwen3_5": (
        "qwen3_5",
        {"text_config": _common(**_LINEAR, head_dim=16), "vision_config": _QWEN_VISION, "image_token_id": 256},
    ),
    "llava": (
        "llava",
        {
            "text_config": {"model_type": "llama", **_common()},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": 256,
        },
    ),
}
"""Architectures that pass too."""

_MANY_EXPERTS = _common(**{**_ROUTED, "first_k_dense_replace": 1}, head_dim=16, num_experts=8, num_local_experts=8)
_MLA_EXPERTS = _common(**_MLA, **_ROUTED, num_experts=8, first_k_dense_replace=2, n_group=1, topk_group=1)

RARE: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, _common(head_dim=16))
        for name in (
            "bitnet",
            "cohere2_moe",
            "doge",
            "falcon_mamba",
            "flex_olmo",
            "gpt_neox_japanese",
            "granite_swa",
            "granitemoe_swa",
            "granitemoeshared",
            "hunyuan_v1_moe",
            "hyperclovax",
            "internlm3",
            "iquestcoder",
            "jais2",
            "jetmoe",
            "lfm3",
            "ministral3",
            "olmo",
            "olmo_hybrid",
            "vaultgemma",
            "xglm",
        )
    },
    **{
        name: (name, _MANY_EXPERTS)
        for name in (
            "afmoe",
            "dots1",
            "ernie4_5_moe",
            "exaone_moe",
            "hy_v3",
            "laguna",
            "mellum",
            "mimo_v2_flash",
            "solar_open",
        )
    },
    "kimi_linear": ("kimi_linear", _common(num_key_value_heads=4)),
    **{name: (name, _MLA_EXPERTS) for name in ("axk1", "bailing_hybrid", "glm4_moe_lite", "mistral4", "youtu")},
}
"""Architectures that pass and are seldom met, or cost a while: only in the long run of the tests."""

ARCHITECTURES = REQUIRED | MORE | RARE


def make_config(name: str) -> Any:
    """The configuration of the tiny model `name`."""
    from transformers import AutoConfig

    model_type, fields = ARCHITECTURES[name]
    return AutoConfig.for_model(model_type, **fields)


def make_checkpoint(name: str, folder: Path, *, seed: int = 0, shard_size: str = "60KB") -> None:
    """Write the tiny model `name`, float32, into `folder`.

    Every parameter is noise, norms and biases too, so that a block that is skipped, doubled or swapped shows.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from slicing.config import model_class

    torch.manual_seed(seed)
    config = make_config(name)
    # Composite checkpoints hold all their parts, also where the text part has a class of its own.
    cls = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None) or model_class(config)
    model = cls._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Recurrences with a random decay would overflow.
            if parameter.is_floating_point() and not parameter_name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 1 else 0.06))
    model.save_pretrained(folder, max_shard_size=shard_size)
