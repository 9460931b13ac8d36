"""Tiny MoE models, built and saved by transformers itself, with a tokenizer and a text."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

WORDS = 60

TopkMethod = Literal["greedy", "group_limited_greedy"]


def make_tiny_model(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    experts: int = 8,
    intermediate: int = 24,
    hidden: int = 32,
    layers: int = 3,
    top_k: int = 2,
    topk_method: TopkMethod = "greedy",
    n_group: int = 1,
    topk_group: int = 1,
    seed: int = 0,
    shards: bool = False,
) -> Path:
    """Save a random DeepSeek-V2 model; its first layer is dense, all others are MoE layers.

    Args:
        folder: Where to save it.
        dtype: Type of all weights.
        experts: Routed experts of a layer.
        intermediate: `moe_intermediate_size`.
        hidden: `hidden_size`.
        layers: Number of layers.
        top_k: Experts a token.
        topk_method: How tokens are routed.
        n_group: Number of expert groups.
        topk_group: Groups a token may use.
        seed: Of the weights.
        shards: In several weight files with an index, rather than in one.
    """
    config = DeepseekV2Config(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * intermediate,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=top_k,
        topk_method=topk_method,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=1.5,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return _save(DeepseekV2ForCausalLM, config, folder, dtype=dtype, seed=seed, shards=shards)


def make_tiny_family(
    folder: Path, model_type: str, *, experts: int = 8, neurons: int = 24, hidden: int = 64
) -> Path:
    """Save a random float32 model with sizes that vLLM's attention has.

    Args:
        folder: Where to save it.
        model_type: `olmoe`, `qwen3_moe`, `mixtral` or `deepseek_v2`, whose first layer is dense.
        experts: Routed experts of a layer.
        neurons: Of an expert.
        hidden: Hidden size.
    """
    heads = 2 if model_type == "olmoe" else 4  # in vLLM, OLMoE's are hidden_size / heads wide
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    architecture: Any
    config: Any
    routed: dict[str, Any] = {"num_experts": experts, "norm_topk_prob": True, "head_dim": 32}
    if model_type == "olmoe":
        architecture = OlmoeForCausalLM
        routed["norm_topk_prob"] = False  # as published; vLLM does not look
        config = OlmoeConfig(**sizes, **routed, intermediate_size=neurons)
    elif model_type == "mixtral":
        architecture = MixtralForCausalLM
        config = MixtralConfig(**sizes, num_local_experts=experts, intermediate_size=neurons)
    elif model_type == "qwen3_moe":
        architecture = Qwen3MoeForCausalLM
        config = Qwen3MoeConfig(
            **sizes, **routed, intermediate_size=48, moe_intermediate_size=neurons
        )
    else:
        architecture = DeepseekV2ForCausalLM
        config = DeepseekV2Config(
            **sizes,
            n_routed_experts=experts,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            routed_scaling_factor=1.5,
            intermediate_size=48,
            moe_intermediate_size=neurons,
            q_lora_rank=None,
            kv_lora_rank=512,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            v_head_dim=64,
        )
    return _save(architecture, config, folder, dtype=torch.float32, seed=0, shards=False)


def _save(
    architecture: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    shards: bool,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # ones would hide a norm that is forgotten
                    parameter.uniform_(0.5, 1.5)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    size = total // 3 if shards else 2 * total
    nn.Module.to(model, dtype).save_pretrained(folder, max_shard_size=size)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """Save a tokenizer of words to the folder of a tiny model: the word `n` is the token n."""
    words = {str(number): number for number in range(WORDS)}
    own = Tokenizer(models.WordLevel({**words, "?": WORDS}, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    saved = PreTrainedTokenizerFast(tokenizer_object=own)  # type: ignore[no-untyped-call]
    saved.save_pretrained(folder)
    return folder


def write_text(path: Path, tokens: int, *, seed: int = 0) -> Path:
    """A text for that tokenizer, in which few words are frequent."""
    words = [str(number) for number in range(WORDS)]
    weights = [1 / (1 + number) for number in range(WORDS)]
    path.write_text(" ".join(Random(seed).choices(words, weights, k=tokens)))
    return path
