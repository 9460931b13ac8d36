"""Tiny random models of every family, from transformers' own configurations made small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForTokenClassification,
)
from transformers.utils import logging

from tuckerize.moe.families import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 12,
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes that are set wherever a configuration has the key."""

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "deepseek_v32": {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "hc_mult": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "sliding_window": 8,
        "swiglu_limit": 0.5,
    },
    "glm5_next": {
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_types": ["full", "full"],
        "qk_rope_head_dim": 0,
        "num_key_value_heads": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_kpool": 4,
        "hc_mult": 2,
        "swiglu_limit": 0.5,
    },
    "hy_v4": {
        "indexer_types": ["full", "full"],
        "index_topk": 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "hc_mult": 2,
        "swiglu_limit": 0.5,
    },
    "llama4_text": {
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 12,
        "moe_layers": [1],
        "attention_chunk_size": 16,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "swiglu_limit": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "minimax_m3_vl": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "dense_intermediate_size": 12,
        "rotary_dim": 4,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "swiglu_limit": 0.5,
    },
    "step3p5": {
        "mlp_layer_types": ["dense", "sparse"],
        "swiglu_limits": [None, 0.5],
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "share_expert_dim": 12,
    },
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "glm4v_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    },
    "inkling2_text": {
        "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "sliding_window_size": 8,
        "unpadded_vocab_size": 64,
        "d_rel": 4,
        "rel_extent": 16,
        "n_layers_per_attn_res_block": 1,
        "mlp_gate_softcap": 0.3,
        "mlp_up_softcap": 0.5,
    },
    "openai_privacy_filter": {
        "sliding_window": 8,
        "swiglu_limit": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "glm_moe_dsa": {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 64,
    },
    "granitemoehybrid": {
        "layer_types": ["attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "jamba": {"mamba_d_state": 4, "attn_layer_offset": 0, "attn_layer_period": 2},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "use_expert_bias": True,
    },
    "qwen3_next": {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_vl_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
}
OWN["longcat_flash"] = {
    "num_layers": 1,
    "ffn_hidden_size": 12,
    "expert_ffn_hidden_size": 12,
    "zero_expert_num": 4,
}
OWN["nemotron_h"] = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "moe_latent_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "moe_shared_expert_intermediate_size": 12,
    "intermediate_size": 12,
}
OWN["qwen3_5_moe_text"] = OWN["qwen3_next"] | {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 0, 0],
        "partial_rotary_factor": 0.25,
    }
}
OWN["hy_v4_vl"] = OWN["hy_v4"] | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
OWN["inkling2_loop_text"] = OWN["inkling2_text"] | {
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_num_passes": 2,
    "loop_gate_rank": 4,
}
OWN["lara_mini"] = OWN["qwen3_next"] | {"sliding_window": 8}
OWN["gemma4"] = OWN["gemma4_text"]
OWN["minimax_m3_vl_text"] = OWN["minimax_m3_vl"]
OWN["qwen3_5_moe"] = OWN["qwen3_5_moe_text"]

FOLDED = [name for name, row in FAMILIES.items() if row.latent]
"""Families that are not decomposed: their latent space becomes smaller."""

FAMILY_NAMES = [name for name in FAMILIES if name not in ("kimi_k2", *FOLDED)]
"""Others that transformers has models of; Kimi-K2 is a DeepSeek-V3 by another name."""

INFERRED = (
    "afmoe",
    "axk1",
    "axk2",
    "cohere2_moe",
    "exaone_moe",
    "granitemoe_swa",
    "kimi_linear",
    "laguna",
    "lara_mini",
    "mellum",
    "qwen4_exp",
    "sarvam_mla",
    "sarvam_moe",
)
"""Families that are not in the table, and whose tensors tell everything."""

DATA_FREE = {
    "inkling2_loop_text": "message_input.query of several tensors",
    "openai_privacy_filter": "predicts no text",
}
"""Families that are not calibrated, and what the error says."""

CALIBRATED = tuple(name for name in (*FAMILY_NAMES, *INFERRED) if name not in DATA_FREE)
"""Families that are calibrated, sharded, verified, evaluated and reconstructed."""

CALIBRATED_OFTEN = (
    "deepseek_v3",
    "deepseek_v4",
    "glm4_moe",
    "gpt_oss",
    "lfm2_moe",
    "minimax_m2",
    "olmoe",
    "qwen3_next",
    "qwen3_vl_moe",
)
"""Those of them that `make test` does too, one of each kind; `make test-families` does the rest."""

EVERY_VERSION = ("olmoe", "qwen3_moe")
"""Families whose whole job `make test-transformers` does, besides DeepSeek-V2's."""

NOT_TESTED = (
    "deepseek_ocr2",
    "diffusion_gemma",
    "dots3_note",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe",
    "flint",
    "inkling",
    "mistral_large4",
    "qwen3_omni_moe_talker",
    "qwen3_omni_moe",
    "unlimited_ocr",
    "zaya",
)
"""Families for which the tensors would have to tell everything, without a model to try it on."""

NESTED = {"mistral4": "mistral3", "step3p5": "step3p7"}
"""Families that are released inside another architecture."""

PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "head_dim": 8,
}
VISION = {
    "depth": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
}


def tiny_config(model_type: str, **own: Any) -> Any:  # noqa: ANN401
    """A small configuration of a family."""
    own = OWN.get(model_type, {}) | own
    if model_type in NESTED:
        text = tiny_text(model_type, own)
        kind: Any = type(AutoConfig.for_model(NESTED[model_type]))
        return kind(text_config=text.to_dict(), vision_config=PIXTRAL)
    base = AutoConfig.for_model(model_type)
    if "text_config" in base.sub_configs:
        text = _shrunk(type(base.text_config), own)
        images = base.vision_config or AutoConfig.for_model(f"{model_type}_vision")
        vision = {k: v for k, v in VISION.items() if hasattr(images, k)}
        vision["model_type"] = images.model_type
        marks = {
            f"{kind}_token_id": 60 + place
            for place, kind in enumerate(("image", "video", "audio"))
            if hasattr(base, f"{kind}_token_id")
        }
        composite: Any = type(base)
        return composite(text_config=text.to_dict(), vision_config=vision, **marks)
    return _shrunk(type(base), own)


def tiny_text(model_type: str, own: dict[str, Any]) -> Any:  # noqa: ANN401
    """The part of a configuration that is of text."""
    return _shrunk(type(AutoConfig.for_model(model_type)), own)


def _shrunk(kind: type, own: dict[str, Any]) -> Any:  # noqa: ANN401
    base: Any = kind()
    base.allow_global_per_layer_attribute_access = True
    known = {key: value for key, value in SIZES.items() if hasattr(base, key)}
    lists = [key for key in known if isinstance(getattr(base, key), list)]
    if "kv_lora_rank" in known:  # latent attention has no groups of queries
        known["num_key_value_heads"] = known["num_attention_heads"]
    return kind(**{**{k: v for k, v in known.items() if k not in lists}, **own})


def auto_class(folder: Path) -> Any:  # noqa: ANN401
    """The class of transformers that loads a checkpoint with everything that it has."""
    return _auto_class(AutoConfig.from_pretrained(folder))


def _auto_class(config: Any) -> Any:  # noqa: ANN401
    others = (AutoModelForImageTextToText, AutoModelForTokenClassification)
    known = (kind for kind in others if type(config) in kind._model_mapping)
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if causal else next(known)


def make_family(folder: Path, model_type: str, *, seed: int = 0, **own: Any) -> Path:  # noqa: ANN401
    """Save a random float32 model of two layers."""
    config = tiny_config(model_type, **own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "norm" in name and tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5)
                elif "bias" in name and "experts" not in name:
                    tensor.uniform_(-0.2, 0.2)
                elif "bias" in name or "sinks" in name:
                    tensor.uniform_(-0.05, 0.05)
                elif name.endswith("tid2eid"):  # two experts of every token
                    first = torch.randint(7, (len(tensor),))
                    tensor.copy_(torch.stack([first, first + 1], 1))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    nn.Module.to(model, torch.float32).save_pretrained(folder)
    return folder
